"""A conversation in the terminal: turns, history, and a KV cache that keeps what it has read."""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event

import torch

from lit_llama.decoding import prepare
from lit_llama.errors import UserError
from lit_llama.files import replacing
from lit_llama.generation import Sampling, decodes_static, default_device, pieces, stream
from lit_llama.many_loras import add_lora, choose_loras, holds_loras
from lit_llama.methods import training_template
from lit_llama.model import LLaMA
from lit_llama.prompts import Messages, encode_prompt, get_template, stop_ids
from lit_llama.quantize import FOR_DECODING, quantization
from lit_llama.tokenizer import Tokenizer

HELP = """\
/reset         forget the conversation
/lora [NAME]   answer with that LoRA (a folder is read), with `base` without one; no name: list them
/save FILE     write the conversation as a line of JSON, which scripts/prepare_json.py takes
/help          this list
/exit          end, as Ctrl-D does; Ctrl-C stops an answer"""
SINGLE_TURN = ("alpaca", "none")  # templates without a place for what was said before


class Chat:
    """One conversation with a model.

    `templates`: the prompt template's name for each LoRA that the model holds (`many_loras`) and, under None, for the
    base; the first one is who answers. The conversation has room for `context` tokens; its oldest turns go first.
    """

    def __init__(
        self,
        model: LLaMA,
        tokenizer: Tokenizer,
        templates: Mapping[str | None, str],
        sampling: Sampling,
        system: str | None = None,
        context: int = 4096,
    ) -> None:
        self.model, self.tokenizer, self.templates, self.sampling = model, tokenizer, dict(templates), sampling
        self.context = min(context, model.config.max_position_embeddings)
        if not 0 < sampling.max_new_tokens < self.context:
            raise UserError(
                f"--max_new_tokens {sampling.max_new_tokens}: should be from 1 on, below --context {self.context}"
            )
        self.system: Messages = [{"role": "system", "content": system}] if system else []
        self.kv_cache = model.make_kv_cache(1, self.context, decodes_static(model.embed_tokens.weight.device))
        self.use(next(iter(self.templates)))
        self.reset()

    def use(self, name: str | None) -> None:
        """Let the LoRA of that name answer from here on; None: the base."""
        self.template, self.lora = get_template(self.templates[name], self.tokenizer), name
        if self.system and self.single_turn:
            raise UserError(f"--system: template {self.templates[name]!r} has no place for it")
        if len(self.templates) > 1:
            choose_loras(self.model, [name])
        self.read: list[int] = []  # the tokens whose keys and values are in the cache: another LoRA's are of no use

    @property
    def single_turn(self) -> bool:
        return self.templates[self.lora] in SINGLE_TURN

    def reset(self) -> None:
        """Forget what was said."""
        self.messages: Messages = []
        self.forgotten = 0  # messages that made room for the last answer

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer to `text` in pieces, as it is decoded; whatever was yielded then counts as said.

        Raises UserError where `text` alone is too long.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self.fit()
        except UserError:
            self.messages.pop()
            raise
        known = next((n for n, (a, b) in enumerate(zip(ids[:-1], self.read, strict=False)) if a != b), None)
        known = min(len(ids) - 1, len(self.read)) if known is None else known
        self.kv_cache.rewind([known])
        ends = stop_ids(self.template, self.tokenizer, self.model.config.eos_token_id)
        said, tokens = "", []

        def decoded() -> Iterator[int]:
            sampling = replace(self.sampling, seed=self.sampling.seed + len(self.messages))
            for token in stream(self.model, [torch.tensor(ids)], sampling, ends, kv_cache=self.kv_cache):
                tokens.append(int(token))
                yield tokens[-1]

        self.read = []  # in case of an error
        try:
            for piece in pieces(self.tokenizer, decoded()):
                said += piece
                yield piece
        finally:
            self.read = ids + tokens[:-1]  # the last one has not been through the model
            self.messages.append({"role": "assistant", "content": said})

    def fit(self) -> list[int]:
        """The prompt's tokens, after the oldest turns were forgotten where there is no room for them and an answer."""
        self.forgotten = 0
        while True:
            turns = self.messages[-1:] if self.single_turn else self.system + self.messages
            ids = encode_prompt(self.template, self.tokenizer, turns)
            room = self.context - self.sampling.max_new_tokens
            if len(ids) <= room:
                return ids
            if len(self.messages) == 1 or self.single_turn:
                raise UserError(f"too long: {len(ids)} tokens, there is room for {room} beside --max_new_tokens")
            del self.messages[:2]
            self.forgotten += 2

    def save(self, file: Path) -> None:
        """Append the conversation to a `.jsonl` file of records with `messages`."""
        old = file.read_bytes() if file.is_file() else b""
        line = json.dumps({"messages": self.system + self.messages}, ensure_ascii=False)
        with replacing(file) as temporary:
            temporary.write_bytes(old + f"{line}\n".encode())

    def command(self, line: str) -> str:
        """Do what a line that begins with / asks for, and return what to print. Raises UserError, EOFError to end."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/exit":
            raise EOFError
        if word == "/reset":
            self.reset()
            return "(forgotten)"
        if word == "/save":
            if not rest or not self.messages:
                raise UserError("/save: nothing was said yet" if rest else "/save: give a file, as in /save a.jsonl")
            self.save(Path(rest).expanduser())
            return f"(saved in {rest})"
        if word == "/lora":
            return self.lora_command(rest)
        return HELP if word == "/help" else f"(no command {word})\n{HELP}"

    def lora_command(self, name: str) -> str:
        """`/lora NAME`, where a name that is not known may be a folder."""
        shown = {"base" if known is None else known: known for known in self.templates}
        if name and name not in shown:
            path = Path(name).expanduser()
            if not holds_loras(self.model):
                raise UserError("/lora: an adapter answers, beside which there can be no LoRA")
            if not path.is_dir():
                raise UserError(f"/lora: no {name!r}, and no such folder. There are: {', '.join(shown)}")
            add_lora(self.model, name, path)
            self.templates[name] = training_template(path) or "alpaca"
            shown[name] = name
        if name:
            self.use(shown[name])
        return ", ".join(f"[{label}]" if known == self.lora else label for label, known in shown.items())


def chat(
    load: Callable[[torch.device], tuple[LLaMA, Tokenizer, dict[str | None, str]]],
    system: str | None = None,
    context: int = 4096,
    max_new_tokens: int = 512,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float = 1.0,
    seed: int = 1234,
    quantize: str | None = None,
) -> None:
    """Talk with a model until the lines on stdin end.

    Args:
        load: gives the model on that device, its tokenizer, and `Chat`'s `templates`.
        system: a system message to begin with.
        context: tokens of the conversation that are kept; the oldest turns go first.
        max_new_tokens: longest answer in tokens.
        temperature: randomness; 0 takes the most likely token each time.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the most likely tokens that make up this probability.
        seed: of the sampling.
        quantize: int8 or int4 weights: faster, and a half or a quarter of the memory.
    """
    sampling, device = Sampling(max_new_tokens, temperature, top_k, top_p, seed), default_device()
    if quantize is not None:
        quantization(quantize, FOR_DECODING)
    model, tokenizer, templates = load(device if quantize is None else torch.device("cpu"))
    prepare(model, device, quantize)
    converse(Chat(model, tokenizer, templates, sampling, system, context))


def converse(chat: Chat) -> None:
    """Read lines from stdin and answer them on stdout until it ends, by `/exit` or Ctrl-D. Mistakes are only told."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        with suppress(ImportError):  # not part of every Python
            import readline  # noqa: F401, gives input() arrow keys and the lines before
        print("Ask away. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
        if chat.single_turn:
            print(f"(template {chat.templates[chat.lora]}: each question stands alone)")
    while True:
        try:
            line = input(prompt).strip()
            if not line:
                continue
            if line.startswith("/"):
                print(chat.command(line))
                continue
            with stop_on_interrupt() as stop, closing(chat.answer(line)) as answer:
                for piece in answer:
                    print(piece, end="", flush=True)
                    if stop.is_set():
                        print(" (stopped)", end="")
                        break
            print("\n", flush=True)
            if chat.forgotten:
                print(f"(the oldest {chat.forgotten} messages are forgotten: there is room for {chat.context} tokens)")
        except UserError as error:
            print(f"({error})")
        except OSError as error:
            print(f"({error.filename or 'writing'}: {error.strerror})")
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)")
        except EOFError:
            print()
            return


@contextmanager
def stop_on_interrupt() -> Iterator[Event]:
    """Inside the block, Ctrl-C sets the event and does nothing else."""
    stop = Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
