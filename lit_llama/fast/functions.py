"""Autograd functions, numerically equivalent to plain PyTorch expressions, that save less.

Backward passes overwrite saved tensors, so they can run only once.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lit_llama.model import apply_rope

Mask = Callable[[], Tensor] | None  # makes the dropout mask of `token_mask`


class CrossEntropyFunction(torch.autograd.Function):
    """F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum"), in chunks of rows.

    Computes the gradient together with the loss, so logits are neither saved nor computed twice.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_states: Tensor, weight: Tensor, labels: Tensor, chunk: int
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        device = hidden_states.device
        loss = torch.zeros((), dtype=torch.float32, device=device)
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_weight = None
        if torch.is_autocast_enabled(device.type):
            weight = weight.to(torch.get_autocast_dtype(device.type))
        # Number of rows per chunk in fp32; on the CPU, a chunk should fit into the cache.
        rows = 16 if device.type == "cpu" else 256
        chunks = zip(hidden_states.split(chunk), labels[:, None].split(chunk), strict=True)
        for index, (x, y) in enumerate(chunks):
            logits = F.linear(x, weight)
            for some_logits, some_labels in zip(logits.split(rows), y.split(rows), strict=True):
                log_probs = some_logits.float().log_softmax(-1)
                loss -= log_probs.gather(1, some_labels).sum()
                # d loss / d logits = softmax(logits) - one_hot(labels), in place of the logits
                minus_one = torch.full_like(some_labels, -1, dtype=torch.float32)
                some_logits.copy_(log_probs.exp_().scatter_add_(1, some_labels, minus_one))
            if needs_hidden:
                grad_hidden[index * chunk : (index + 1) * chunk] = logits @ weight
            if needs_weight:
                partial = logits.T @ x.to(logits.dtype)
                if grad_weight is not None:
                    grad_weight.add_(partial)
                else:  # Summed in fp32 if there are several chunks.
                    grad_weight = partial.float() if len(labels) > chunk else partial
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd casts them to the dtypes of the inputs.
        grads = [None if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors]
        return *grads, None, None


class RMSNormFunction(torch.autograd.Function):
    """`RMSNorm.forward` that saves only x for backward."""

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
        size = x.size(-1)
        r = torch.linalg.vecdot(wide, wide)[..., None].div_(size).add_(ctx.eps).rsqrt_()
        along = torch.linalg.vecdot(wide, grad_normed)[..., None].mul_(r**3 / size)
        grad_x = torch.addcmul(grad_normed.mul_(r), wide, along, value=-1).to(x.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * (wide * r).to(x.dtype)).flatten(0, -2).sum(0)
        return grad_x, grad_weight, None


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up that saves only gate and up."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class RoPEFunction(torch.autograd.Function):
    """`apply_rope`. Backward rotates by the negative angles, so only cos and sin are saved."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return apply_rope(x, (cos, sin))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return apply_rope(grad, (cos, -sin)), None, None


class LoRAFunction(torch.autograd.Function):
    """y + scaling * B A (x * mask), into y itself.

    y (tokens, out), x (tokens, in), a (r, in) and b (out, r) are of one dtype. `mask` returns a
    factor for x, or is None.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, mask: Mask
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
        grad_b = (low_rank.T @ grad).T  # faster than grad.T @ low_rank
        grad_low_rank = (grad @ b).mul_(ctx.scaling)
        grad_x = grad_low_rank @ a
        if ctx.mask is not None:
            mask = ctx.mask()
            x = x * mask
            grad_x.mul_(mask)
        return grad, grad_x, grad_low_rank.T @ x, grad_b, None, None
