"""Decoding: one pass over the prompts (prefill), then one token at a time with a KV cache."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.errors import UserError
from lit_llama.kv_cache import KVCache
from lit_llama.model import LLaMA

StopIds = int | Collection[int] | None
Decoder = Callable[[LLaMA, Sequence[Tensor], "Sampling"], Iterator[Tensor]]


@dataclass
class Sampling:
    """How many tokens to decode, and how to sample them."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None  # sample from the k most likely tokens only
    top_p: float = 1.0  # nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751
    seed: int | None = None  # None: torch's global random state

    def generator(self, device: torch.device) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)


def generate(
    model: LLaMA,
    input_ids: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_id: StopIds = None,
    seed: int | None = None,
) -> Tensor | list[Tensor]:
    """Return prompts and new tokens: (seq,) -> (seq + new,), (batch, seq) -> (batch, seq + new).

    Prompts of different lengths, a list of (seq,), are one batch too, and return a list. Decoding
    stops once every row has an `eos_id`; rows that stopped earlier are padded with the first one.
    """
    single = isinstance(input_ids, Tensor) and input_ids.dim() == 1
    prompts = [input_ids] if single else list(input_ids)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    steps = [tokens.tolist() for tokens in stream(model, prompts, sampling, eos_id)]
    new = torch.tensor(steps, dtype=torch.long, device=prompts[0].device).view(-1, len(prompts))
    sequences = [torch.cat(pair) for pair in zip(prompts, new.T, strict=True)]
    if single:
        return sequences[0]
    return torch.stack(sequences) if isinstance(input_ids, Tensor) else sequences


def stream(
    model: LLaMA,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    eos_id: StopIds = None,
    decoder: Decoder | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of each prompt (seq,), stop tokens included: (batch,) int64 on the CPU.

    `decoder` is `decode` by default; another one is `fast.speculation.speculate` with a draft.
    """
    longest, new = max(map(len, prompts)), sampling.max_new_tokens
    if min(map(len, prompts)) == 0:
        raise UserError("a prompt is empty, and there is no BOS token. Give --prompt some text")
    if longest + new > (context := model.config.max_position_embeddings):
        size = f"the prompt has {longest} tokens and --max_new_tokens asks for {new} more"
        raise UserError(f"{size}, the model's context holds {context}. Shorten one of them")
    # A tokenizer may define more tokens than the model has; that is fine until one comes up.
    table = model.embed_tokens
    sizes = getattr(table, "row_sizes", [len(table.weight)] * len(prompts))
    for ids, size in zip(prompts, sizes, strict=False):
        if (token := int(ids.max())) >= size:
            problem = f"the prompt has token id {token}, the model's embedding only {size} rows"
            raise UserError(f"{problem}. Use the model's own tokenizer, or save its new rows")
    tokens = (decoder or decode)(model, prompts, sampling)
    stops = torch.tensor([eos_id] if isinstance(eos_id, int) else list(eos_id or [-1]))  # -1: none
    stopped = torch.zeros(len(prompts), dtype=torch.bool)
    if table.weight.is_cuda:
        from lit_llama.fast.decoding import copy_to_cpu_async  # it imports the book

        tokens = copy_to_cpu_async(tokens)
    for token in tokens:
        # A row that has stopped is still computed, but its tokens no longer count.
        token = torch.where(stopped, stops[0], token)
        stopped |= torch.isin(token, stops)
        yield token
        if stopped.all():
            return


@torch.inference_mode()
def decode(
    model: LLaMA, prompts: Sequence[Tensor], sampling: Sampling, kv_cache: KVCache | None = None
) -> Iterator[Tensor]:
    """Yield `max_new_tokens` times the next token of each prompt, (batch,), on the model's device.

    `kv_cache` may hold the first tokens of a single prompt already, but not its last token.
    """
    device = model.embed_tokens.weight.device
    generator = sampling.generator(device)
    if kv_cache is None:
        max_length = max(map(len, prompts)) + sampling.max_new_tokens
        kv_cache = model.make_kv_cache(len(prompts), max_length)
    # Prefill: one pass over all prompts, packed without padding. Only the last token of each has
    # an unknown successor, so logits (batch, vocab) are computed there and nowhere else.
    new_ids = [prompt[kv_cache.length :] for prompt in prompts]
    lengths = [len(ids) for ids in new_ids]
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    logits = model(torch.cat(new_ids).to(device), lengths, label_positions=last, kv_cache=kv_cache)
    require_numbers(logits)
    token = None
    for _ in range(sampling.max_new_tokens):
        # Each further pass sees one token per row; all that came before is in the cache.
        if token is not None:
            logits = model(token[:, None], kv_cache=kv_cache)[:, -1]
        token = sample(logits, sampling, generator)
        yield token


def require_numbers(logits: Tensor) -> None:
    """Raise UserError if logits are NaN: greedy decoding would print some token nevertheless."""
    if logits.isnan().any():
        hint = "Its weights are damaged, or it needs --precision 32-true"
        raise UserError(f"the model's logits are not numbers (NaN). {hint}")


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Sample token ids (batch,) from logits (batch, vocab)."""
    if sampling.temperature == 0:
        # Faster than argmax for bf16 on the CPU.
        return logits.max(-1).indices
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator)[:, 0]


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Convert logits (batch, vocab) to the probabilities to sample from, in fp32."""
    if sampling.temperature == 0:
        return F.one_hot(logits.max(-1).indices, logits.size(-1)).float()
    # On a GPU, this check would wait for the logits in each step.
    if not logits.is_cuda:
        require_numbers(logits)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        # Ties with the k-th largest logit stay, as in transformers.
        kth = logits.topk(min(sampling.top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, indices = probs.sort(dim=-1, descending=True)
        # A token stays if those before it sum to less than p, so the first one always does.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, indices, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs
