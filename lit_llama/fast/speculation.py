"""Speculative decoding: Leviathan et al. 2023, arXiv 2211.17192, algorithm 1."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lit_llama.errors import UserError
from lit_llama.generation import Sampling, probabilities
from lit_llama.kv_cache import KVCache
from lit_llama.model import LLaMA


@torch.inference_mode()
def speculate(
    model: LLaMA, prompts: Sequence[Tensor], sampling: Sampling, draft: LLaMA, num_draft: int = 4
) -> Iterator[Tensor]:
    """Decode one prompt as `generation.decode` does, with a small model ahead of the large one.

    The small model drafts `num_draft` tokens, the large one scores them in a single pass and
    accepts or rejects each so that its own distribution is unchanged. Greedy decoding gives equal
    tokens.
    """
    if len(prompts) > 1 or draft.config.vocab_size != model.config.vocab_size:
        raise UserError("--draft_checkpoint_dir: for one prompt, and a draft of equal vocab_size")
    weight, ids = model.embed_tokens.weight, prompts[0].tolist()
    device, generator = weight.device, sampling.generator(weight.device)
    start, end = len(ids), len(ids) + sampling.max_new_tokens
    cache = KVCache(model.config, 1, end, device, weight.dtype)
    draft_cache = KVCache(draft.config, 1, end, device, weight.dtype)
    while (known := len(ids)) < end:
        # Draft a few tokens, none in the first pass, which is the prefill. Never fill the answer:
        # the model itself adds one token to those that it accepts.
        drafted, draft_probs = [], []
        for _ in range(min(num_draft, end - known - 1) if known > start else 0):
            unseen = torch.tensor([(ids + drafted)[draft_cache.length :]], device=device)
            logits = draft(unseen, kv_cache=draft_cache)[:, -1]
            draft_probs.append(probabilities(logits, sampling))  # (1, vocab)
            drafted.append(int(torch.multinomial(draft_probs[-1], 1, generator=generator)))
        # Score all of them in one pass, which also predicts the token after the last.
        unseen = torch.tensor([ids[cache.length :] + drafted], device=device)
        logits = model(unseen, kv_cache=cache)[0, -len(drafted) - 1 :]
        probs = probabilities(logits, sampling)  # (drafted + 1, vocab)
        next_probs = probs[-1]
        for token, q, p in zip(drafted, draft_probs, probs, strict=False):
            # Accept with probability min(1, p / q). A rejected token is replaced by one sampled
            # from max(0, p - q), which makes up for what the draft model likes too much.
            if torch.rand((), generator=generator, device=device) * q[0, token] >= p[token]:
                next_probs = (p - q[0]).clamp(min=0)
                break
            ids.append(token)
        # Remove rejected tokens. The newest token is not in the caches yet.
        for kv_cache in (cache, draft_cache):
            kv_cache.truncate([min(kv_cache.length, len(ids))])
        ids.append(int(torch.multinomial(next_probs, 1, generator=generator)))
        yield from torch.tensor(ids[known:], device=device)[:, None]
