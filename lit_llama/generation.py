"""Decoding: one prefill, then a token at a time from the KV cache."""

import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama import fast
from lit_llama.attention import KVCache
from lit_llama.checkpoint import load_model
from lit_llama.decoding import DecodeStep, prepare
from lit_llama.distributed import peak_memory_bytes
from lit_llama.errors import UserError
from lit_llama.files import read_text
from lit_llama.many_loras import choose_loras
from lit_llama.model import LLaMA
from lit_llama.prompts import encode_prompt, get_template, stop_ids
from lit_llama.quantize import FOR_DECODING, quantization
from lit_llama.records import check_length
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
        good = (
            (self.temperature == 0 or 1e-6 <= self.temperature < math.inf)
            and self.max_new_tokens >= 0
            and 0 < self.top_p <= 1
        )
        if not good or (self.top_k is not None and self.top_k < 1):
            hint = "--max_new_tokens from 0 on, --top_p in (0, 1], --top_k from 1 on"
            raise UserError(f"--temperature should be 0 or from 1e-6 on, {hint}")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """What draws: of its own where there is a seed."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)


def generate(
    model: LLaMA,
    input_ids: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_id: int | Collection[int] | None = None,
    seed: int | None = None,
) -> Tensor | list[Tensor]:
    """Prompt and what follows it: (seq,) or (batch, seq) int64 -> (seq + new,) or (batch, seq + new).

    Decoding ends when all rows have ended with `eos_id` (one token or several); a row that ended before goes on with
    the first of them. Prompts of different lengths, a list of (seq,), are decoded together without padding and give a
    list. The other arguments are `Sampling`'s. Raises UserError as `stream` does.
    """
    single = isinstance(input_ids, Tensor) and input_ids.dim() == 1
    rows = [input_ids] if single else list(input_ids)
    tokens = list(stream(model, rows, Sampling(max_new_tokens, temperature, top_k, top_p, seed), eos_id))
    new = torch.stack(tokens, dim=1).to(rows[0].device) if tokens else rows[0].new_zeros(len(rows), 0)
    whole = [torch.cat(parts) for parts in zip(rows, new, strict=True)]
    if single:
        return whole[0]
    return torch.stack(whole) if isinstance(input_ids, Tensor) else whole


def stream(
    model: LLaMA,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    eos_id: int | Collection[int] | None = None,
    compile: bool = False,
    draft: LLaMA | None = None,
    kv_cache: KVCache | None = None,
) -> Iterator[Tensor]:
    """Yield the tokens (batch,) that follow the prompts, each (seq,), as they are decoded, on the CPU.

    Those that end a row are included. `compile` is `DecodeStep`'s; `draft` makes it `speculate`, for a single prompt;
    `kv_cache` is `decode`'s.
    Raises UserError where prompt and new tokens exceed the model's context.
    """
    longest, new = max(len(prompt) for prompt in prompts), sampling.max_new_tokens
    if not all(len(prompt) for prompt in prompts):
        raise UserError("a prompt is empty, and this model has no BOS token to start from. Give --prompt some text")
    for which in (model, *([draft] if draft else [])):
        if longest + new > (context := which.config.max_position_embeddings):
            asked = f"the prompt has {longest} tokens and --max_new_tokens asks for {new} more"
            raise UserError(f"{asked}, the model's context holds {context}. Shorten one of them")
    ends = torch.tensor([eos_id] if isinstance(eos_id, int) else list(eos_id or []), dtype=torch.long)
    if draft is None:
        tokens = decode(model, prompts, sampling, compile, kv_cache)
    else:
        tokens = speculate(model, draft, prompts, sampling)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for token in read_late(tokens):
        if len(ends):
            token = torch.where(ended, ends[0], token)
            ended |= torch.isin(token, ends)
        yield token
        if ended.all():
            return


@torch.inference_mode()
def decode(
    model: LLaMA,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    compile: bool = False,
    kv_cache: KVCache | None = None,
) -> Iterator[Tensor]:
    """Yield `sampling.max_new_tokens` times a token (batch,) for each of the prompts, on the model's device.

    `kv_cache`, with room for all, may hold the first tokens of a single prompt already, but not its last one.
    """
    device, lengths = model.embed_tokens.weight.device, [len(prompt) for prompt in prompts]
    new, generator = sampling.max_new_tokens, sampling.generator(device)
    if kv_cache is None:
        kv_cache = model.make_kv_cache(len(lengths), max(lengths) + new, decodes_static(device, compile))
    step = None
    for _ in range(new):
        if step is None:
            ids = torch.cat([prompt[kv_cache.longest :] for prompt in prompts]).to(device)
            last = torch.tensor(lengths).cumsum(0).to(device) - 1 - kv_cache.longest
            rows = dict(input_ids=ids, lengths=lengths) if kv_cache.empty else dict(input_ids=ids[None])
            logits = model(**rows, positions=last, kv_cache=kv_cache)
            step = DecodeStep(model, kv_cache, compile)
        else:
            logits = step(token)  # noqa: F821, of the round before
        token = sample(logits, sampling, generator)
        yield token


def decodes_static(device: torch.device, compile: bool = False) -> bool:
    """Whether `decode` wants a static KV cache."""
    return fast.enabled and (compile or device.type == "cuda")


@torch.inference_mode()
def speculate(
    model: LLaMA, draft: LLaMA, prompts: Sequence[Tensor], sampling: Sampling, num_draft: int = 4
) -> Iterator[Tensor]:
    """What `decode` yields for one prompt, with a small model of the same vocabulary ahead of the large one.

    Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1): the draft proposes `num_draft` tokens,
    the model looks at all of them in one pass, and keeps as many as leave its own distribution what it was. Greedy
    decoding gives the very tokens of `decode`. Raises UserError for several prompts or another vocabulary.
    """
    if len(prompts) > 1 or draft.config.vocab_size != model.config.vocab_size:
        sizes = f"{draft.config.vocab_size} tokens, the model's {model.config.vocab_size}"
        raise UserError(f"--draft_checkpoint_dir: for one prompt, and a draft of one vocabulary (the draft's: {sizes})")
    device, seq, end = model.embed_tokens.weight.device, len(prompts[0]), len(prompts[0]) + sampling.max_new_tokens
    generator = sampling.generator(device)
    cache, draft_cache = (which.make_kv_cache(1, end) for which in (model, draft))
    ids = prompts[0].tolist()
    while len(ids) < end:
        known, proposed = len(ids), []  # the model's cache holds all of `ids` but the last, none at first
        while len(proposed) < min(num_draft, end - known - 1) and known > seq:
            unseen = torch.tensor([(ids + [token for token, _ in proposed])[draft_cache.longest :]], device=device)
            guess = probabilities(draft(unseen, kv_cache=draft_cache)[:, -1], sampling)  # (1, vocab)
            proposed.append((int(draw(guess, generator)), guess[0]))
        block = torch.tensor([ids[cache.longest :] + [token for token, _ in proposed]], device=device)
        wanted = probabilities(model(block, kv_cache=cache)[0, -len(proposed) - 1 :], sampling)  # (proposed + 1, vocab)
        for (token, guess), want in zip(proposed, wanted, strict=False):
            chance = torch.rand((), generator=generator, device=device)
            if chance * guess[token] >= want[token]:  # refused: draw from what the draft's guess leaves over
                want = (want - guess).clamp(min=0)
                break
            ids.append(token)
            yield torch.tensor([token], device=device)
        else:
            want = wanted[-1]
        for kept in (cache, draft_cache):
            kept.rewind([min(kept.longest, len(ids))])
        ids.append(int(draw(want[None], generator)))
        yield torch.tensor(ids[-1:], device=device)


def read_late(tokens: Iterator[Tensor]) -> Iterator[Tensor]:
    """The tokens on the CPU; those of a GPU each a step late, when the next one is underway already."""
    waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
    for token in tokens:
        arrived = torch.cuda.Event() if token.is_cuda else None
        waiting.append((token.to("cpu", non_blocking=True), arrived))
        if arrived is None:
            yield waiting.popleft()[0]
            continue
        arrived.record()
        if len(waiting) > 1:
            waiting[0][1].synchronize()
            yield waiting.popleft()[0]
    for token, arrived in waiting:
        arrived.synchronize()
        yield token


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw (batch,) token ids from (batch, vocab) logits."""
    if sampling.temperature == 0:
        return logits.max(-1).indices  # on the CPU ahead of argmax in bf16
    return draw(probabilities(logits, sampling), generator)


def draw(chances: Tensor, generator: torch.Generator | None) -> Tensor:
    """One (batch,) of each row of (batch, vocab). Raises UserError where the model computes no numbers, on the CPU."""
    try:
        return torch.multinomial(chances, 1, generator=generator)[:, 0]
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        hint = "Its weights are damaged, or it needs --precision 32-true"
        raise UserError(f"the model's logits are not numbers (NaN). {hint}") from None


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """(batch, vocab) logits -> what tokens are drawn from, up to a factor per row: (batch, vocab), fp32."""
    if sampling.temperature == 0:
        return F.one_hot(logits.max(-1).indices, logits.size(-1)).float()
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
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def answer(
    load: Callable[[torch.device], tuple[LLaMA, Tokenizer, str | dict[str, str]]],
    prompt: str | None = None,
    input: str = "",
    prompt_file: Path | None = None,
    batch_size: int = 8,
    num_samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float = 1.0,
    seed: int = 1234,
    quantize: str | None = None,
    draft_checkpoint_dir: Path | None = None,
    compile: bool = False,
    fast_paths: bool = True,
) -> None:
    """Print answers on stdout, then seconds, tokens/s and memory on stderr.

    Args:
        load: gives the model on that device, its tokenizer and the name of a prompt template that `get_template` knows;
            for a model that holds several LoRAs (`many_loras`), which answer each prompt, the template of each by the
            LoRA's name. Called when the flags have been looked at. The model is of no other use afterwards.
        prompt: the instruction, or with --template none the text to go on from; the answer is printed as it comes.
        input: context for the instruction.
        prompt_file: a text file with a prompt in each line; prints a JSON line with prompt and answer for each.
        batch_size: how many prompts of the file are answered at a time.
        num_samples: how many answers, with seeds counted up.
        max_new_tokens: longest answer in tokens.
        temperature: randomness; 0 takes the most likely token each time.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the most likely tokens that make up this probability.
        seed: of the sampling.
        quantize: int8 or int4 weights: faster, and a half or a quarter of the memory.
        draft_checkpoint_dir: a small model of the same family that runs ahead (speculative decoding), for --prompt.
        compile: let torch.compile fuse each step; takes up to a minute first.
        fast_paths: false: decode the plain way that the fast ones equal.
    """
    if (prompt is None) == (prompt_file is None):
        raise UserError("--prompt, --prompt_file: give one of them")
    if batch_size < 1 or num_samples < 1:
        raise UserError("--batch_size, --num_samples: should be at least 1")
    if quantize is not None:
        quantization(quantize, FOR_DECODING)
    fast.enabled, device = fast_paths, default_device()
    if compile and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("--compile: needs a C++ compiler on the CPU, and g++ is not installed")
    prompts = [prompt] if prompt_file is None else read_prompts(prompt_file)
    settings = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    # what is to be quantized is loaded on the CPU, and goes to the GPU smaller
    model, tokenizer, template = load(loading := device if quantize is None else torch.device("cpu"))
    names = list(template) if isinstance(template, dict) else []
    templates = [get_template(name, tokenizer) for name in (template.values() if names else [template])]
    ends = list(dict.fromkeys(i for how in templates for i in stop_ids(how, tokenizer, model.config.eos_token_id)))
    encoded = [
        [torch.tensor(encode_prompt(how, tokenizer, [message]), dtype=torch.long) for how in templates]
        for message in ({"role": "user", "content": text, "input": input} for text in prompts)
    ]
    prepare(model, device, quantize, fast_paths, compile)
    draft = None
    if draft_checkpoint_dir is not None:
        draft = load_model(draft_checkpoint_dir, loading, model.embed_tokens.weight.dtype)
        prepare(draft, device, quantize, fast_paths)
    for number in range(num_samples):
        started, count = time.perf_counter(), 0
        sampling = replace(settings, seed=seed + number)
        for first in range(0, len(prompts), batch_size):
            some = prompts[first : first + batch_size]
            rows = [row for each in encoded[first : first + batch_size] for row in each]
            if names:
                choose_loras(model, names * len(some))
            tokens = stream(model, rows, sampling, ends, compile, draft)
            if prompt_file is None and not names:
                for count, piece in enumerate(pieces(tokenizer, map(int, tokens))):  # noqa: B007, used below
                    print(piece, end="", flush=True)
                print(flush=True)
                continue
            answers = []
            for ids in zip(*(token.tolist() for token in tokens), strict=True):
                ids = until_end(ids, ends)
                count += len(ids)
                answers.append(tokenizer.decode(ids))
            if prompt_file is None:
                print("\n".join(side_by_side(dict(zip(names, answers, strict=True)))), flush=True)
                continue
            for place, text in enumerate(some):
                own = answers[place * len(templates) : (place + 1) * len(templates)]
                result = {"answers": dict(zip(names, own, strict=True))} if names else {"answer": own[0]}
                print(json.dumps({"prompt": text} | result, ensure_ascii=False), flush=True)
        seconds = time.perf_counter() - started
        speed = f"{seconds:.2f} seconds total, {count / seconds:.2f} tokens/sec"
        print(f"Time for inference {number + 1}: {speed}", file=sys.stderr)
    print(f"Memory used: {peak_memory_bytes(device) / 1e9:.2f} GB", file=sys.stderr)


def until_end(ids: Sequence[int], ends: Collection[int]) -> Sequence[int]:
    """The token ids in front of the first one that is in `ends`."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def side_by_side(texts: Mapping[str, str], width: int | None = None) -> list[str]:
    """Lines with a column for each text under its title, or one text below the other where `width` has no room.

    `width` is that of all in characters; default: the terminal's.
    """
    width = shutil.get_terminal_size((120, 24)).columns if width is None else width
    own = (width + 2) // len(texts) - 2
    if own < 36:
        return "\n\n".join(f"{title}\n{'-' * len(title)}\n{text}" for title, text in texts.items()).splitlines()
    columns = [
        [title if len(title) <= own else f"...{title[3 - own :]}", "-" * own]
        + [part for line in text.strip().splitlines() for part in textwrap.wrap(line, own) or [""]]
        for title, text in texts.items()
    ]
    return ["  ".join(f"{cell:{own}}" for cell in cells).rstrip() for cells in zip_longest(*columns, fillvalue="")]


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that hold something. Raises UserError where there is none."""
    lines = read_text(file, hint=". Give a text file with --prompt_file").splitlines()
    prompts = [line for line in lines if line.strip()]
    for number, prompt in enumerate(prompts, start=1):
        check_length(prompt, f"{file}, prompt {number}")
    if not prompts:
        raise UserError(f"{file}: holds no prompt. Write one in each line")
    return prompts


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
