"""Autograd functions, numerically equivalent to plain PyTorch expressions, that save less.

Backward passes overwrite saved tensors, so they can run only once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lit_llama.dropout import Mask
from lit_llama.fast import kernels


class CrossEntropyFunction(torch.autograd.Function):
    """F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum"), in chunks of rows.

    Computes the gradient together with the loss, so logits are neither saved nor computed twice.
    `chunk` rows of logits are in memory at once, `rows` of them in fp32.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_states: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        rows: int,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        device = hidden_states.device
        loss = torch.zeros((), dtype=torch.float32, device=device)
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_weight = None
        if torch.is_autocast_enabled(device.type):
            weight = weight.to(torch.get_autocast_dtype(device.type))
        chunks = zip(hidden_states.split(chunk), labels[:, None].split(chunk), strict=True)
        for index, (x, y) in enumerate(chunks):
            logits = F.linear(x, weight)
            for some_logits, some_labels in zip(logits.split(rows), y.split(rows), strict=True):
                wide = some_logits.float()
                probs = wide.softmax(-1)
                # log p = logit - top logit + log(top p), as p of the label may round to zero.
                top_logit, top_prob = wide.amax(1, keepdim=True), probs.amax(1, keepdim=True)
                loss -= (wide.gather(1, some_labels) - top_logit + top_prob.log()).sum()
                del wide
                # d loss / d logits = softmax(logits) - one_hot(labels), in place of the logits
                minus_one = torch.full_like(some_labels, -1, dtype=torch.float32)
                some_logits.copy_(probs.scatter_add_(1, some_labels, minus_one))
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
        return *grads, None, None, None


class RMSNormFunction(torch.autograd.Function):
    """`RMSNorm.forward` that saves only x for backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return kernels.rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        return *kernels.rms_norm_backward(grad, x, weight, ctx.eps, needs_weight), None


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up that saves only gate and up."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernels.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.swiglu_backward(grad, *ctx.saved_tensors)


class RoPEFunction(torch.autograd.Function):
    """`apply_rope`. Backward rotates by the negative angles, so only cos and sin are saved."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return kernels.rope(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return kernels.rope_backward(grad, *ctx.saved_tensors), None, None


class LoRAFunction(torch.autograd.Function):
    """y + scaling * B A (x * mask), into y itself.

    y (tokens, out), x (tokens, in), a (r, in) and b (out, r) are of one dtype. The mask, that of
    `token_mask`, may be None.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        mask: Mask | None,
    ) -> Tensor:
        low_rank = F.linear(x if mask is None else kernels.masked(x, *mask), a).mul_(scaling)
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
            x, grad_x = kernels.masked_both(x, grad_x, *ctx.mask)
        return grad, grad_x, grad_low_rank.T @ x, grad_b, None, None
