"""Decoding: one prefill, then a token at a time from the KV cache."""

import dataclasses
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_llama.distributed import peak_memory_bytes
from lit_llama.errors import UserError
from lit_llama.model import LLaMA
from lit_llama.prompts import encode_prompt, get_template, stop_ids
from lit_llama.tokenizer import Tokenizer


@torch.inference_mode()
def stream(
    model: LLaMA,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_id: int | Collection[int] | None = None,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Yield the tokens that follow each row of `input_ids` (batch, seq), as they are decoded; see `generate`.

    Yields:
        (batch,) int64, the next token of each row, the one that ends it included.
    """
    batch_size, seq = input_ids.shape
    context = model.config.max_position_embeddings
    if seq == 0:
        raise UserError("the prompt is empty, and this model has no BOS token to start from. Give --prompt some text")
    if seq + max_new_tokens > context:
        raise UserError(
            f"the prompt has {seq} tokens and --max_new_tokens asks for {max_new_tokens} more, "
            f"the model's context holds {context}. Shorten one of them"
        )
    if temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1) or max_new_tokens < 0:
        raise UserError("--temperature and --max_new_tokens should be from 0 on, --top_p in (0, 1], --top_k at least 1")
    ends = [eos_id] if isinstance(eos_id, int) else list(eos_id or [])
    end_ids = torch.tensor(ends, dtype=torch.long, device=input_ids.device)
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    kv_cache = model.make_kv_cache(batch_size, seq + max_new_tokens)
    ended = torch.zeros(batch_size, dtype=torch.bool, device=input_ids.device)
    last = torch.arange(1, batch_size + 1, device=input_ids.device) * seq - 1
    for _ in range(max_new_tokens):
        logits = model(input_ids, positions=last, kv_cache=kv_cache)  # (batch, vocab)
        token = sample(logits, temperature, top_k, top_p, generator)
        if ends:
            token = torch.where(ended, end_ids[0], token)
            ended |= torch.isin(token, end_ids)
        yield token
        if ends and bool(ended.all()):
            return
        input_ids, last = token[:, None], torch.arange(batch_size, device=token.device)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Draw (batch,) token ids from (batch, vocab) logits."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, indices = probabilities.sort(dim=-1, descending=True)
        # a token stays while those before it have not reached p yet, so the first one always does
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, indices, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def generate(
    model: LLaMA,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_id: int | Collection[int] | None = None,
    seed: int | None = None,
) -> Tensor:
    """Prompt and what follows it.

    Args:
        model: in eval mode.
        input_ids: (seq,) or (batch, seq) int64, on the model's device.
        max_new_tokens: at most that many.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the fewest tokens whose probabilities add up to p (Holtzman et al. 2020, arXiv 1904.09751).
        eos_id: token or tokens that end a row. Decoding ends when all rows have ended; an ended row goes on with the
            first of them.
        seed: of the sampling; default: torch's global random state.

    Returns:
        (seq + new,) or (batch, seq + new) int64.

    Raises:
        UserError: prompt and new tokens exceed the model's context, or a setting is out of range.
    """
    rows = input_ids if input_ids.dim() == 2 else input_ids[None]
    tokens = list(stream(model, rows, max_new_tokens, temperature, top_k, top_p, eos_id, seed))
    whole = torch.cat((rows, *(token[:, None] for token in tokens)), dim=1)
    return whole if input_ids.dim() == 2 else whole[0]


@dataclass
class Sampling:
    """How answers are decoded; the fields are `stream`'s arguments."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int


def answer(
    model: LLaMA, tokenizer: Tokenizer, prompt: str, input: str, template: str, num_samples: int, sampling: Sampling
) -> None:
    """Print answers to a prompt on stdout as their tokens come, then seconds, tokens/s and memory on stderr.

    Args:
        prompt: the instruction, or with template "none" the text to go on from.
        input: context for the instruction, or "".
        template: name of the prompt template.
        num_samples: how many answers, with the seeds `sampling.seed`, `sampling.seed + 1`...
    """
    device = model.embed_tokens.weight.device
    how = get_template(template, tokenizer)
    message = {"role": "user", "content": prompt, "input": input}
    input_ids = torch.tensor([encode_prompt(how, tokenizer, [message])], dtype=torch.long, device=device)
    ends = stop_ids(how, tokenizer, model.config.eos_token_ids)
    for number in range(num_samples):
        settings = dataclasses.asdict(sampling) | {"seed": sampling.seed + number}
        started = time.perf_counter()
        text = TextStream(tokenizer)
        new_tokens = 0
        for token in stream(model, input_ids, eos_id=ends, **settings):
            new_tokens += 1
            print(text.add(int(token)), end="", flush=True)
        print(text.rest())
        seconds = time.perf_counter() - started
        print(
            f"Time for inference {number + 1}: {seconds:.2f} seconds total, {new_tokens / seconds:.2f} tokens/sec",
            file=sys.stderr,
        )
    print(f"Memory used: {peak_memory_bytes(device) / 1e9:.2f} GB", file=sys.stderr)


class TextStream:
    """Turns tokens into text as they come; holds back what is half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.ids, self.printed = tokenizer, [], ""

    def add(self, index: int) -> str:
        """The text that is complete with this token."""
        self.ids.append(index)
        return self._new(whole=False)

    def rest(self) -> str:
        """What was held back."""
        return self._new(whole=True)

    def _new(self, whole: bool) -> str:
        text = self.tokenizer.decode(self.ids)
        if not whole and text.endswith("\ufffd"):  # bytes of a character that is not complete yet
            return ""
        new, self.printed = text[len(self.printed) :], text
        return new


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
