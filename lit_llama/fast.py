"""Faster forms of plain expressions, each beside the one that it equals; `tests/test_fast.py` compares them.

`--train.fast_paths false` goes the plain ways, which are the ones to read first: `LLaMA.cross_entropy_sum`,
`causal_attention`, `rms_norm`, `swiglu`, `rotate`, `LoRALinear.forward`.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

enabled = True


def training() -> bool:
    """Whether to take the forms whose gain lies on the way back."""
    return enabled and torch.is_grad_enabled()


def recompute(function: Callable[..., Tensor], *args: Any, preserve_rng_state: bool = False) -> Tensor:
    """`function(*args)`, computed again in the backward pass: for what is cheaper to compute than to keep in memory.

    A function that draws random numbers needs `preserve_rng_state` to draw the same ones again.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


class LinearCrossEntropySum(torch.autograd.Function):
    """F.cross_entropy(F.linear(hidden_states, weight).float(), labels, reduction="sum"), `chunk` rows at a time.

    The gradient is computed together with the loss, from the same logits: they are neither kept nor computed twice.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden_states: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        grad_hidden = torch.empty_like(hidden_states) if of_hidden else None
        grad_weight = None
        weight_dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        # rows in fp32 at a time: on the CPU, as many as its cache holds
        part = 16 if hidden_states.device.type == "cpu" else 256
        for rows in range(0, len(labels), chunk):
            x, y = hidden_states[rows : rows + chunk], labels[rows : rows + chunk, None]
            logits = F.linear(x, weight)
            for some, labels_of_some in zip(logits.split(part), y.split(part), strict=True):
                log_probabilities = some.float().log_softmax(-1)
                loss -= log_probabilities.gather(1, labels_of_some).sum()
                # d loss / d logits = softmax(logits) - one_hot(labels), in the place of the logits
                minus_one = -torch.ones_like(labels_of_some, dtype=torch.float32)
                some.copy_(log_probabilities.exp_().scatter_add_(1, labels_of_some, minus_one))
            if of_hidden:
                grad_hidden[rows : rows + chunk] = logits @ weight
            if of_weight:
                part_of_weight = logits.T @ x.to(logits.dtype)
                if len(labels) > chunk:  # summed in fp32
                    grad_weight = part_of_weight.float() if grad_weight is None else grad_weight.add_(part_of_weight)
                else:
                    grad_weight = part_of_weight
        if of_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # in place: there is no second way back, which would find them changed and say so
        grad_hidden = None if grad_hidden is None else grad_hidden.mul_(grad)
        grad_weight = None if grad_weight is None else grad_weight.mul_(grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


class ShortAttention(torch.autograd.Function):
    """Causal attention within samples of at most `SHORT` tokens by matmul and softmax: on the CPU ahead of the flash
    kernel, which is slow on its way back.

    Query and result are (tokens, heads, head_dim), key and value (tokens, key/value heads, head_dim). Samples of a like
    length are one matmul, in which the query heads that share a key head are one matrix.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, like: "LikeSamples") -> Tensor:
        shared, kept = query.size(1) // key.size(1), []
        q, k, v = like.take(query), like.take(key), like.take(value)
        attended = torch.empty_like(q)
        for length, q_part, into, k_part, v_part in like.groups(shared, (q, attended), (k, v)):
            probabilities = attention_probabilities(q_part, k_part)
            torch.bmm(probabilities, v_part, out=into)
            kept.append(probabilities if length <= KEEP and any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.like = like
        return like.put(attended, query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        like, shared = ctx.like, query.size(1) // key.size(1)
        q, k, v, grad_result = like.take(query), like.take(key), like.take(value), like.take(grad, padding_is_zero=True)
        grad_q, grad_k, grad_v = (torch.empty_like(rows) for rows in (q, k, v))
        groups = like.groups(shared, (q, grad_result, grad_q), (k, v, grad_k, grad_v))
        for p, (_, q, grad_attended, into_q, k, v, into_k, into_v) in zip(kept, groups, strict=True):
            p = attention_probabilities(q, k) if p is None else p
            torch.bmm(p.mT, grad_attended, out=into_v)
            grad_scores = torch._softmax_backward_data(grad_attended @ v.mT, p, -1, p.dtype)
            grad_scores.mul_(1 / math.sqrt(q.size(-1)))
            torch.bmm(grad_scores, k, out=into_q)
            torch.bmm(grad_scores.mT, q, out=into_k)
        return like.put(grad_q, query.shape), like.put(grad_k, key.shape), like.put(grad_v, value.shape), None


SHORT = 512  # tokens up to which ShortAttention is the faster one
KEEP = 256  # tokens up to which its probabilities are kept for the way back, rather than computed again


class LikeSamples:
    """The samples of a row of tokens, in groups whose lengths round up to the same multiple of 32: so there are few
    shapes of matmuls, for each of which oneDNN makes a kernel.

    `take` lays them out as (samples, heads, length) rows, group after group; padding repeats a sample's last token.
    """

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.starts = lengths, [0, *accumulate(lengths)]
        self.members: dict[int, list[int]] = {}  # rounded length -> samples
        for sample, length in enumerate(lengths):
            self.members.setdefault(-(-length // 32) * 32, []).append(sample)
        self.rows: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def rows_of(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which of the (tokens * heads) rows of x each of `take` is; where each of x went; which are padding."""
        if heads not in self.rows:
            source, padding, first, head = [], [], 0, torch.arange(heads)[:, None]
            target = [torch.empty(0)] * len(self.lengths)
            for length, members in self.members.items():
                for sample in members:
                    place, real = torch.arange(length), self.lengths[sample]
                    rows = first + head * length + place  # (heads, length)
                    source.append((self.starts[sample] + place.clamp(max=real - 1)) * heads + head)
                    target[sample] = rows[:, :real].T
                    padding.append(rows[:, real:])
                    first += heads * length
            self.rows[heads] = tuple(torch.cat([t.flatten() for t in part]) for part in (source, target, padding))
        return self.rows[heads]

    def take(self, x: Tensor, padding_is_zero: bool = False) -> Tensor:
        """(tokens, heads, head_dim) -> (rows, head_dim)."""
        source, _, padding = self.rows_of(x.size(1))
        rows = x.reshape(-1, x.size(2)).index_select(0, source)
        return rows.index_fill_(0, padding, 0) if padding_is_zero and len(padding) else rows

    def put(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The other way, to x's shape."""
        return rows.index_select(0, self.rows_of(shape[1])[1]).view(shape)

    def groups(self, shared: int, of_query: tuple[Tensor, ...], of_key: tuple[Tensor, ...]) -> Iterator[tuple]:
        """Each group's length and its part of the rows, one matrix for each key head of a sample: of queries, of which
        `shared` heads go with a key head, (samples * key heads, shared * length, head_dim); of keys (., length, .)."""
        first, key_heads = 0, len(of_key[0]) // sum(length * len(ids) for length, ids in self.members.items())
        for length, members in self.members.items():
            count = len(members) * length * key_heads
            views = [
                t[first * shared : (first + count) * shared].view(-1, shared * length, t.size(1)) for t in of_query
            ]
            views += [t[first : first + count].view(-1, length, t.size(1)) for t in of_key]
            yield length, *views
            first += count


def attention_probabilities(query: Tensor, key: Tensor) -> Tensor:
    """(n, shared * length, head_dim), (n, length, head_dim) -> (n, shared * length, length).

    No real token looks at padding, which comes after it.
    """
    mask = _causal_mask(key.size(1), query.size(1) // key.size(1), query.dtype)
    return torch.baddbmm(mask, query, key.mT, alpha=1 / math.sqrt(query.size(-1))).softmax(-1)


@lru_cache(maxsize=64)
def _causal_mask(seq: int, groups: int, dtype: torch.dtype) -> Tensor:
    """(groups * seq, seq): minus infinity where a query must not look, zero elsewhere."""
    return torch.full((seq, seq), -torch.inf, dtype=dtype).triu(1).repeat(groups, 1)


class RMSNormKeepingInput(torch.autograd.Function):
    """`model.rms_norm`; x alone is kept."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return (weight * F.rms_norm(x, weight.shape, eps=eps).to(x.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # y = x r with r = 1 / sqrt(mean(x^2) + eps): dx = r dy - x r^3 mean(x dy)
        wide, grad_normed = x.float(), (grad * weight).float()
        r = torch.linalg.vecdot(wide, wide)[..., None].div_(x.size(-1)).add_(ctx.eps).rsqrt_()
        along = torch.linalg.vecdot(wide, grad_normed)[..., None].mul_(r**3 / x.size(-1))
        grad_x = torch.addcmul(grad_normed.mul_(r), wide, along, value=-1).to(x.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * (wide * r).to(x.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up; the two factors are kept, not what is computed from them."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class Rotate(torch.autograd.Function):
    """`model.rotate`, whose way back is the rotation by the opposite angles: nothing is kept but the table."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor, rotate: Callable) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotate = rotate
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return ctx.rotate(grad, cos, -sin), None, None, None


class AddLowRank(torch.autograd.Function):
    """y + scaling * B A (x * mask), into y itself: y (tokens, out), x (tokens, in), a (r, in), b (out, r), one dtype.

    `mask` gives a factor for x, or is None. Nothing is kept but x and the (tokens, r) product in the middle.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, mask: Callable[[], Tensor] | None
    ) -> Tensor:
        low_rank = F.linear(x if mask is None else x * mask(), a).mul_(scaling)
        ctx.save_for_backward(x, a, b, low_rank)
        ctx.scaling, ctx.mask = scaling, mask
        ctx.mark_dirty(y)
        return y.addmm_(low_rank, b.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low_rank = ctx.saved_tensors
        grad_b = (low_rank.T @ grad).T  # the faster way round
        grad_low_rank = (grad @ b).mul_(ctx.scaling)
        mask = None if ctx.mask is None else ctx.mask()
        grad_a = grad_low_rank.T @ (x if mask is None else x * mask)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = grad_low_rank @ a
            grad_x = grad_x if mask is None else grad_x.mul_(mask)
        return grad, grad_x, grad_a, grad_b, None, None
