"""Causal attention within short samples by matmul and softmax, for training on the CPU.

There the flash kernel is slow in its backward pass. Samples of similar length are one matmul, in
which the query heads that share a key head are one matrix.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

MAX_SAMPLE_TOKENS = 512  # longest sample for which this is faster than the flash kernel
MAX_SAVED_TOKENS = 256  # longest sample whose probabilities are saved instead of recomputed


class LengthBuckets:
    """Packed samples in buckets of one length, rounded up to a multiple of 32.

    This limits the number of matmul shapes, for each of which oneDNN builds a kernel. In the
    bucketed layout, samples are (heads, rounded length) rows, bucket after bucket; padding repeats
    a sample's last token.
    """

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.starts = [0, *accumulate(lengths)]
        self.samples: dict[int, list[int]] = {}  # rounded length -> samples
        for sample, length in enumerate(lengths):
            self.samples.setdefault(-(-length // 32) * 32, []).append(sample)
        self.indices: dict[int, list[Tensor]] = {}  # by number of heads

    def indices_for(self, heads: int) -> list[Tensor]:
        """Return gather indices, scatter indices and padding rows between the two layouts."""
        if heads in self.indices:
            return self.indices[heads]
        gather, padding, first = [], [], 0
        scatter = [torch.empty(0)] * len(self.lengths)
        head = torch.arange(heads)[:, None]
        for length, samples in self.samples.items():
            position = torch.arange(length)
            for sample in samples:
                real = self.lengths[sample]
                rows = first + head * length + position  # (heads, length)
                token = self.starts[sample] + position.clamp(max=real - 1)
                gather.append(token * heads + head)
                scatter[sample] = rows[:, :real].T
                padding.append(rows[:, real:])
                first += heads * length
        parts = (gather, scatter, padding)
        self.indices[heads] = [torch.cat([t.flatten() for t in part]) for part in parts]
        return self.indices[heads]

    def gather(self, x: Tensor) -> Tensor:
        """Lay (tokens, heads, head_dim) out as bucketed rows (rows, head_dim)."""
        return x.reshape(-1, x.size(2)).index_select(0, self.indices_for(x.size(1))[0])

    def scatter(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Lay bucketed rows out as a packed tensor of this shape again."""
        return rows.index_select(0, self.indices_for(shape[1])[1]).view(shape)

    def split(self, key_heads: int, *layouts: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield for each bucket its views of bucketed rows, one matrix per sample and key head.

        Of queries these are (samples * key heads, q_per_kv * length, head_dim), of keys
        (samples * key heads, length, head_dim).
        """
        counts = [len(samples) for samples in self.samples.values()]
        tokens = [length * len(samples) for length, samples in self.samples.items()]
        parts = [rows.split([n * (len(rows) // sum(tokens)) for n in tokens]) for rows in layouts]
        for count, *bucket in zip(counts, *parts, strict=True):
            yield tuple(rows.view(count * key_heads, -1, rows.size(1)) for rows in bucket)


class ShortAttentionFunction(torch.autograd.Function):
    """`causal_attention` on the CPU. Shapes are those of `causal_attention`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, buckets: LengthBuckets
    ) -> Tensor:
        q, k, v = buckets.gather(query), buckets.gather(key), buckets.gather(value)
        attended, saved = torch.empty_like(q), []
        for q_part, k_part, v_part, out in buckets.split(key.size(1), q, k, v, attended):
            probs = attention_probabilities(q_part, k_part)
            torch.bmm(probs, v_part, out=out)
            saved.append(probs if k_part.size(1) <= MAX_SAVED_TOKENS else None)
        ctx.save_for_backward(query, key, value, *saved)
        ctx.buckets = buckets
        return buckets.scatter(attended, query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        buckets = ctx.buckets
        rows = [buckets.gather(x) for x in (query, key, value, grad)]
        rows[3].index_fill_(0, buckets.indices_for(query.size(1))[2], 0)  # padding has no gradient
        grads = [torch.empty_like(x) for x in rows[:3]]
        parts = buckets.split(key.size(1), *rows, *grads)
        for probs, (q, k, v, grad_out, grad_q, grad_k, grad_v) in zip(saved, parts, strict=True):
            if probs is None:
                probs = attention_probabilities(q, k)
            torch.bmm(probs.mT, grad_out, out=grad_v)
            grad_scores = torch._softmax_backward_data(grad_out @ v.mT, probs, -1, probs.dtype)
            scaled = dict(beta=0, alpha=1 / math.sqrt(q.size(-1)))
            torch.baddbmm(grad_q, grad_scores, k, **scaled, out=grad_q)
            torch.baddbmm(grad_k, grad_scores.mT, q, **scaled, out=grad_k)
        return *map(buckets.scatter, grads, (query.shape, key.shape, value.shape)), None


def attention_probabilities(query: Tensor, key: Tensor) -> Tensor:
    """Return the softmax of q k^T, (n, q_per_kv * length, length), of two matrices of `split`.

    Padding comes after all real tokens, so none of them attends to it.
    """
    mask = _causal_mask(key.size(1), query.size(1) // key.size(1), query.dtype)
    return torch.baddbmm(mask, query, key.mT, alpha=1 / math.sqrt(query.size(-1))).softmax(-1)


@lru_cache(maxsize=64)
def _causal_mask(seq: int, repeats: int, dtype: torch.dtype) -> Tensor:
    """Return (repeats * seq, seq): minus infinity above the diagonal, zero elsewhere."""
    return torch.full((seq, seq), -torch.inf, dtype=dtype).triu(1).repeat(repeats, 1)
