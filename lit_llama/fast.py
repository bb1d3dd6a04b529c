"""Faster forms of plain expressions, each beside the one that it equals; `tests/test_fast.py` compares them.

`--train.fast_paths false` goes the plain ways, which are the ones to read first: `LLaMA.cross_entropy_sum`,
`causal_attention`, `LoRALinear.forward`.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

enabled = True


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
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        weight_dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        for rows in range(0, len(labels), chunk):
            x, y = hidden_states[rows : rows + chunk], labels[rows : rows + chunk, None]
            logits = F.linear(x, weight)
            dtype, log_probabilities = logits.dtype, logits.float().log_softmax(-1)
            loss -= log_probabilities.gather(1, y).sum()
            if of_hidden or of_weight:
                # d loss / d logits = softmax(logits) - one_hot(labels)
                grad_logits = log_probabilities.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=torch.float32))
                grad_logits = grad_logits.to(dtype)
            if of_hidden:
                grad_hidden[rows : rows + chunk] = grad_logits @ weight
            if of_weight:
                grad_weight += grad_logits.T @ x.to(dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype)
        grad_weight = None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def short_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one sample by matmul and softmax: on the CPU ahead of the flash kernel, slow on its way back.

    Query and result are (heads, seq, head_dim), key and value (key/value heads, seq, head_dim). The query heads that
    share a key head are one matrix.
    """
    (heads, seq, head_dim), groups = query.shape, query.size(0) // key.size(0)
    mask = _causal_mask(seq, groups, query.dtype, query.device)
    stacked = query.reshape(key.size(0), groups * seq, head_dim)
    scores = torch.baddbmm(mask, stacked, key.transpose(1, 2), alpha=1 / math.sqrt(head_dim))
    return (scores.softmax(-1) @ value).view(heads, seq, head_dim)


@lru_cache(maxsize=64)
def _causal_mask(seq: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(groups * seq, seq): minus infinity where a query must not look, zero elsewhere."""
    return torch.full((seq, seq), -torch.inf, dtype=dtype, device=device).triu(1).repeat(groups, 1)


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
        grad_b = grad.T @ low_rank
        grad_low_rank = (grad @ b).mul_(ctx.scaling)
        dropped = x if ctx.drop is None else ctx.drop(x)
        grad_a = grad_low_rank.T @ dropped
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = grad_low_rank @ a
            grad_x = grad_x if ctx.drop is None else ctx.drop(grad_x)
        return grad, grad_x, grad_a, grad_b, None, None
