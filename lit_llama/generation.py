"""Decoding: one prefill, then a token at a time from the KV cache."""

import sys
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_llama.distributed import peak_memory_bytes
from lit_llama.errors import UserError
from lit_llama.model import LLaMA
from lit_llama.prompts import encode_prompt, get_template, stop_ids
from lit_llama.tokenizer import Tokenizer


@dataclass
class Sampling:
    """How tokens are drawn; raises UserError for values out of range.

    Args:
        max_new_tokens: at most that many.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the fewest tokens whose probabilities add up to p (Holtzman et al. 2020, arXiv 1904.09751).
        seed: of the sampling; default: torch's global random state.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        good = self.temperature >= 0 and self.max_new_tokens >= 0 and 0 < self.top_p <= 1
        if not good or (self.top_k is not None and self.top_k < 1):
            raise UserError(
                "--temperature, --max_new_tokens: should be from 0 on, --top_p in (0, 1], --top_k from 1 on"
            )


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
    """Prompt and what follows it: (seq,) or (batch, seq) int64 -> (seq + new,) or (batch, seq + new).

    Decoding ends when all rows have ended with `eos_id` (one token or several); a row that ended before goes on with
    the first of them. The other arguments are `Sampling`'s. Raises UserError as `stream` does.
    """
    rows = input_ids if input_ids.dim() == 2 else input_ids[None]
    tokens = stream(model, rows, Sampling(max_new_tokens, temperature, top_k, top_p, seed), eos_id)
    whole = torch.cat((rows, *(token[:, None] for token in tokens)), dim=1)
    return whole if input_ids.dim() == 2 else whole[0]


@torch.inference_mode()
def stream(
    model: LLaMA, input_ids: Tensor, sampling: Sampling, eos_id: int | Collection[int] | None = None
) -> Iterator[Tensor]:
    """Yield the tokens (batch,) that follow the rows of `input_ids` as they are decoded, those that end them included.

    The arguments are `generate`'s. Raises UserError where prompt and new tokens exceed the model's context.
    """
    (batch_size, seq), device = input_ids.shape, input_ids.device
    max_new_tokens, context = sampling.max_new_tokens, model.config.max_position_embeddings
    if seq == 0:
        raise UserError("the prompt is empty, and this model has no BOS token to start from. Give --prompt some text")
    if seq + max_new_tokens > context:
        asked = f"the prompt has {seq} tokens and --max_new_tokens asks for {max_new_tokens} more"
        raise UserError(f"{asked}, the model's context holds {context}. Shorten one of them")
    ends = [eos_id] if isinstance(eos_id, int) else list(eos_id or [])
    end_ids = torch.tensor(ends, dtype=torch.long, device=device)
    generator = None if sampling.seed is None else torch.Generator(device).manual_seed(sampling.seed)
    kv_cache = model.make_kv_cache(batch_size, seq + max_new_tokens)
    ended = torch.zeros(batch_size, dtype=torch.bool, device=device)
    last = torch.arange(1, batch_size + 1, device=device) * seq - 1
    for _ in range(max_new_tokens):
        logits = model(input_ids, positions=last, kv_cache=kv_cache)  # (batch, vocab)
        token = sample(logits, sampling, generator)
        if ends:
            token = torch.where(ended, end_ids[0], token)
            ended |= torch.isin(token, end_ids)
        yield token
        if ends and bool(ended.all()):
            return
        input_ids, last = token[:, None], torch.arange(batch_size, device=device)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw (batch,) token ids from (batch, vocab) logits."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        least = logits.topk(min(sampling.top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, indices = probabilities.sort(dim=-1, descending=True)
        # a token stays while those before it have not reached p yet, so the first one always does
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, indices, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def answer(
    model: LLaMA,
    tokenizer: Tokenizer,
    template: str,
    prompt: str,
    input: str = "",
    num_samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float = 1.0,
    seed: int = 1234,
) -> None:
    """Print answers to a prompt on stdout as their tokens come, then seconds, tokens/s and memory on stderr.

    Args:
        model: what answers.
        tokenizer: the model's.
        template: the prompt template, a name that `get_template` knows.
        prompt: the instruction, or with --template none the text to go on from.
        input: context for the instruction.
        num_samples: how many answers, with seeds counted up.
        max_new_tokens: longest answer in tokens.
        temperature: randomness; 0 takes the most likely token each time.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the most likely tokens that make up this probability.
        seed: of the sampling.
    """
    device = model.embed_tokens.weight.device
    how = get_template(template, tokenizer)
    prompt_ids = encode_prompt(how, tokenizer, [{"role": "user", "content": prompt, "input": input}])
    input_ids = torch.tensor([prompt_ids], dtype=torch.long, device=device)
    ends = stop_ids(how, tokenizer, model.config.eos_token_id)
    for number in range(num_samples):
        started = time.perf_counter()
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed + number)
        tokens = stream(model, input_ids, sampling, ends)
        for new_tokens, piece in enumerate(pieces(tokenizer, map(int, tokens))):  # noqa: B007, used below
            print(piece, end="", flush=True)
        seconds = time.perf_counter() - started
        print(flush=True)
        speed = f"{seconds:.2f} seconds total, {new_tokens / seconds:.2f} tokens/sec"
        print(f"Time for inference {number + 1}: {speed}", file=sys.stderr)
    print(f"Memory used: {peak_memory_bytes(device) / 1e9:.2f} GB", file=sys.stderr)


def pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text that each token completes, then what is left: half a character is held back until the other half."""
    ids: list[int] = []
    done = text = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        complete = done if text.endswith("\ufffd") else text
        yield complete[len(done) :]
        done = complete
    yield text[len(done) :]


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
