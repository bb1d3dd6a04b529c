"""A conversation in the terminal: turns, commands, and a KV cache that is reused between turns."""

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from threading import Event

import torch
from answering import stream_text

from lit_llama.errors import UserError
from lit_llama.generation import Sampling, decode, stream
from lit_llama.model import LLaMA
from lit_llama.multi_lora import load_adapter, multi_lora_layers, set_adapters
from lit_llama.prompts import Messages, content, encode_prompt, get_template, stop_ids
from lit_llama.storage.files import atomic_write
from lit_llama.storage.methods import PromptFormat, prompt_format
from lit_llama.tokenizer import Tokenizer

HELP = """\
/reset         forget the conversation
/input TEXT    context for the next question, as the input of a record; without a text: none
/lora [NAME]   answer with that LoRA or its folder, or with `base`; without a name: list them
/save FILE     append the conversation to a .jsonl file, for scripts/prepare_json.py
/help          this list
/exit          end, as Ctrl-D does; Ctrl-C stops an answer"""


class Chat:
    """One conversation with a model.

    Args:
        model: optimized for inference already.
        tokenizer: of the base model.
        templates: the prompt template's name, or a PromptFormat if the tokenizer differs, for each
            LoRA that the model holds, and under None for the base; the first one answers.
        sampling: of each answer; the seed is counted up.
        system: system message.
        context: maximum number of tokens; the oldest turns are forgotten first.
        template: the prompt template of LoRAs that /lora loads; default: that of their training.
    """

    def __init__(
        self,
        model: LLaMA,
        tokenizer: Tokenizer,
        templates: Mapping[str | None, str | PromptFormat],
        sampling: Sampling,
        system: str | None = None,
        context: int = 4096,
        template: str | None = None,
    ) -> None:
        self.model = model
        self.base_dir = tokenizer.path.parent
        eos = model.config.eos_token_id
        self.formats = {
            name: PromptFormat(tokenizer, form, eos) if isinstance(form, str) else form
            for name, form in templates.items()
        }
        self.sampling, self.given_template = sampling, template
        self.context = min(context, model.config.max_position_embeddings)
        if not 0 < sampling.max_new_tokens < self.context:
            problem = f"should be from 1 on, below --context {self.context}"
            raise UserError(f"--max_new_tokens {sampling.max_new_tokens}: {problem}")
        self.system: Messages = [{"role": "system", "content": system}] if system else []
        self.messages: Messages = []
        self.input = ""  # context for the next question
        self.forgotten = 0  # messages that made room for the last answer
        self.kv_cache = model.make_kv_cache(1, self.context)
        self.cached: list[int] = []  # the tokens in the cache
        self.use(next(iter(self.formats)))

    def use(self, name: str | None) -> None:
        """Answer with the LoRA of that name from now on; None: the base model."""
        form = self.formats[name]
        template = get_template(form.template, form.tokenizer)
        stops = stop_ids(template, form.tokenizer, form.eos_ids)
        if self.system and not template.multi_turn:
            raise UserError(f"--system: template {form.template!r} has no place for it")
        self.lora, self.tokenizer, self.template, self.stops = name, form.tokenizer, template, stops
        if len(self.formats) > 1:
            set_adapters(self.model, [name])
        self.cached = []  # another LoRA computes other keys and values

    @property
    def single_turn(self) -> bool:
        return not self.template.multi_turn

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = []
        self.forgotten = 0

    def reply(self, text: str) -> Iterator[str]:
        """Yield the answer in pieces, as it is decoded; if closed early, keep what was yielded."""
        context = {"input": self.input} if self.input else {}
        self.messages.append({"role": "user", "content": text} | context)
        try:
            ids = self.fit()
        except UserError:
            self.messages.pop()
            raise
        self.input = ""
        # reuse the cache up to the first token that differs; the last one must go through the model
        same = takewhile(lambda pair: pair[0] == pair[1], zip(ids[:-1], self.cached, strict=False))
        self.kv_cache.truncate([len(list(same))])
        sampling = replace(self.sampling, seed=self.sampling.seed + len(self.messages))
        decoder = partial(decode, kv_cache=self.kv_cache)
        new: list[int] = []

        def decoded() -> Iterator[int]:
            prompts = [torch.tensor(ids)]
            for token in stream(self.model, prompts, sampling, self.stops, decoder):
                new.append(int(token))
                yield new[-1]

        answer = ""
        self.cached = []  # if decoding fails
        try:
            for piece in stream_text(self.tokenizer, decoded(), self.stops):
                answer += piece
                yield piece
        finally:
            self.cached = ids + new[:-1]  # the last token has not been through the model
            self.messages.append({"role": "assistant", "content": answer})

    def fit(self) -> list[int]:
        """Return the prompt's tokens; forget the oldest turns if an answer would not fit."""
        self.forgotten = 0
        room = self.context - self.sampling.max_new_tokens
        while True:
            turns = self.messages[-1:] if self.single_turn else self.system + self.messages
            ids = encode_prompt(self.template, self.tokenizer, turns)
            if len(ids) <= room:
                return ids
            if len(self.messages) == 1 or self.single_turn:
                size = f"{len(ids)} tokens, there is room for {room} beside --max_new_tokens"
                raise UserError(f"too long: {size}")
            del self.messages[:2]
            self.forgotten += 2

    def save(self, file: Path) -> None:
        """Append the conversation to a `.jsonl` file of records with `messages`."""
        old = file.read_bytes() if file.is_file() else b""
        messages = self.system + self.messages
        messages = [{"role": m["role"], "content": content(m)} for m in messages]
        line = json.dumps({"messages": messages}, ensure_ascii=False)
        with atomic_write(file) as temporary:
            temporary.write_bytes(old + f"{line}\n".encode())

    def command(self, line: str) -> str:
        """Run a line that starts with / and return what to print. Raises EOFError to end."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/exit":
            raise EOFError
        if word == "/reset":
            self.reset()
            return "(forgotten)"
        if word == "/save":
            if not rest:
                raise UserError("/save: give a file, as in /save a.jsonl")
            if not self.messages:
                raise UserError("/save: nothing was said yet")
            self.save(Path(rest).expanduser())
            return f"(saved in {rest})"
        if word == "/input":
            self.input = rest
            return "(context for the next question)" if rest else "(no context)"
        if word == "/lora":
            return self.switch_lora(rest)
        return HELP if word == "/help" else f"(no command {word})\n{HELP}"

    def switch_lora(self, name: str) -> str:
        """Use a LoRA, loading a folder if needed; return all names, the current in brackets."""
        known = {"base" if lora is None else lora: lora for lora in self.formats}
        if name and name not in known:
            path = Path(name).expanduser()
            if not multi_lora_layers(self.model):
                raise UserError("/lora: an adapter answers, beside which there can be no LoRA")
            if not path.is_dir():
                names = ", ".join(known)
                raise UserError(f"/lora: no {name!r}, and no such folder. There are: {names}")
            load_adapter(self.model, name, path)
            self.formats[name] = prompt_format(path, self.base_dir, self.given_template)
            known[name] = name
        if name:
            self.use(known[name])
        labels = (f"[{label}]" if lora == self.lora else label for label, lora in known.items())
        return ", ".join(labels)


def converse(chat: Chat) -> None:
    """Answer the lines of stdin until it ends, by /exit or Ctrl-D. Print mistakes as a line."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        with suppress(ImportError):  # not part of every Python
            import readline  # noqa: F401, gives input() arrow keys and a history
        print("Ask away. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
        if chat.single_turn:
            name = chat.formats[chat.lora].template
            print(f"(template {name}: each question stands alone)")
    while True:
        try:
            line = input(prompt).strip()
            if line.startswith("/"):
                print(chat.command(line))
            elif line:
                print_reply(chat, line)
        except UserError as error:
            print(f"({error})")
        except OSError as error:
            print(f"({error.filename or 'writing'}: {error.strerror})")
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)")
        except EOFError:
            print()
            return


def print_reply(chat: Chat, text: str) -> None:
    """Print the answer as it is decoded, until it ends or Ctrl-C stops it."""
    with stop_on_interrupt() as stop, closing(chat.reply(text)) as answer:
        for piece in answer:
            print(piece, end="", flush=True)
            if stop.is_set():
                print(" (stopped)", end="")
                break
    print("\n", flush=True)
    if chat.forgotten:
        room = f"there is room for {chat.context} tokens"
        print(f"(the oldest {chat.forgotten} messages are forgotten: {room})")


@contextmanager
def stop_on_interrupt() -> Iterator[Event]:
    """Inside the block, Ctrl-C sets the event instead of raising KeyboardInterrupt."""
    stop = Event()
    handler = signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, handler)
