"""Faster forms of plain expressions, each beside the one that it equals; `tests/test_fast.py` compares them.

`--train.fast_paths false` goes the plain ways, which are the ones to read first: `LLaMA.cross_entropy_sum`,
`causal_attention`, `rms_norm`, `swiglu`, `rotate`, `LoRALinear.forward`.
"""

import math
from collections.abc import Callable
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
        for rows in range(0, len(labels), chunk):
            x, y = hidden_states[rows : rows + chunk], labels[rows : rows + chunk, None]
            logits = F.linear(x, weight)
            # on the CPU as many rows at a time as its cache holds in fp32
            part = 16 if logits.device.type == "cpu" else chunk
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
    length, up to the next multiple of 32, are one matmul, in which the query heads that share a key head are one
    matrix; so the matmuls' shapes, for each of which oneDNN makes a kernel, are few.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, groups: list["LikeSamples"]) -> Tensor:
        result, kept = torch.empty_like(query), []
        for group in groups:
            q, k, v = group.take(query, key.size(1)), group.take(key), group.take(value)
            probabilities = group.probabilities(q, k)
            group.put(result, probabilities @ v)
            kept.append(probabilities if group.length <= KEEP and any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.groups = groups
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        for group, p in zip(ctx.groups, kept, strict=True):
            q, k, v = group.take(query, key.size(1)), group.take(key), group.take(value)
            p = group.probabilities(q, k) if p is None else p
            grad_result = group.take(grad, key.size(1), padding_is_zero=True)
            grad_scores = torch._softmax_backward_data(grad_result @ v.mT, p, -1, p.dtype)
            grad_scores.mul_(1 / math.sqrt(q.size(-1)))
            for total, part in zip(grads, (grad_scores @ k, grad_scores.mT @ q, p.mT @ grad_result), strict=True):
                group.put(total, part)
        return *grads, None


SHORT = 512  # tokens up to which ShortAttention is the faster one
KEEP = 256  # tokens up to which its probabilities are kept for the way back, rather than computed again


class LikeSamples:
    """Samples whose lengths round up to `length`, and where in the row of all tokens theirs lie."""

    def __init__(self, length: int, starts: list[int], lengths: list[int]) -> None:
        self.length = length
        last = [start + count - 1 for start, count in zip(starts, lengths, strict=True)]
        tokens = [[min(start + n, end) for n in range(length)] for start, end in zip(starts, last, strict=True)]
        self.tokens = torch.tensor(tokens).flatten()
        rows = [n < count for count in lengths for n in range(length)]
        self.real, self.padding = (
            torch.tensor([row for row, real in enumerate(rows) if real is wanted], dtype=torch.long)
            for wanted in (True, False)
        )
        self.places = self.tokens[self.real]

    def take(self, x: Tensor, heads: int = 0, padding_is_zero: bool = False) -> Tensor:
        """(tokens, n, head_dim) -> (samples * heads, n / heads * length, head_dim); padding repeats the last token."""
        heads = heads or x.size(1)
        rows = x.index_select(0, self.tokens)
        if padding_is_zero:
            rows.index_fill_(0, self.padding, 0)
        rows = rows.view(-1, self.length, heads, x.size(1) // heads, x.size(2)).permute(0, 2, 3, 1, 4)
        return rows.reshape(rows.size(0) * heads, -1, x.size(2))

    def put(self, into: Tensor, x: Tensor) -> None:
        """The other way: what `take` gave for real tokens goes to their places."""
        count, shape = into.size(1), into.shape[1:]
        samples = len(self.tokens) // self.length
        rows = x.view(samples, -1, count * samples // x.size(0), self.length, x.size(2)).permute(0, 3, 1, 2, 4)
        rows = rows.reshape(-1, *shape).index_select(0, self.real)
        into.index_copy_(0, self.places, rows)

    def probabilities(self, query: Tensor, key: Tensor) -> Tensor:
        """(n, groups * length, head_dim), (n, length, head_dim) -> (n, groups * length, length). No real token looks
        at padding, which comes after it."""
        mask = _causal_mask(self.length, query.size(1) // self.length, query.dtype)
        return torch.baddbmm(mask, query, key.mT, alpha=1 / math.sqrt(query.size(-1))).softmax(-1)


def like_samples(lengths: list[int]) -> list[LikeSamples]:
    """All samples, in groups of lengths that round up to the same multiple of 32."""
    starts = [0, *accumulate(lengths)]
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(-(-length // 32) * 32, []).append(index)
    pick = lambda values, indices: [values[index] for index in indices]  # noqa: E731
    return [LikeSamples(length, pick(starts, ids), pick(lengths, ids)) for length, ids in groups.items()]


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
    """y + scaling * B A drop(x), into y itself: y (tokens, out), x (tokens, in), a (r, in), b (out, r), one dtype.

    `drop` multiplies by a mask, or is None. Nothing is kept but x and the (tokens, r) product in the middle.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, drop: Callable | None
    ) -> Tensor:
        low_rank = F.linear(x if drop is None else drop(x), a).mul_(scaling)
        ctx.save_for_backward(x, a, b, low_rank)
        ctx.scaling, ctx.drop = scaling, drop
        ctx.mark_dirty(y)
        return y.addmm_(low_rank, b.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low_rank = ctx.saved_tensors
        grad_b = (low_rank.T @ grad).T  # the faster way round
        grad_low_rank = (grad @ b).mul_(ctx.scaling)
        dropped = x if ctx.drop is None else ctx.drop(x)
        grad_a = grad_low_rank.T @ dropped
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = grad_low_rank @ a
            grad_x = grad_x if ctx.drop is None else ctx.drop(grad_x)
        return grad, grad_x, grad_a, grad_b, None, None
