"""Elementwise parts of the fast modules. On a GPU, torch.compile makes one kernel of each.

Such a kernel reads its inputs once and keeps intermediate results in registers. It needs Triton
and a C compiler; without them, and on the CPU, the function runs as it is written.
"""

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.model import apply_rope


def c_compiler() -> str | None:
    """Return the path of the C compiler that Triton builds its launchers with, if there is one."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return next(filter(None, map(shutil.which, names)), None)


# Set to False to run the functions as they are written on a GPU too.
COMPILE = importlib.util.find_spec("triton") is not None and c_compiler() is not None
# Called with a function and its arguments in the place of a kernel, by what counts kernels.
stand_in: Callable[[Callable, tuple], Any] | None = None


def runs_compiled(device: torch.device) -> bool:
    """Tell whether kernels are compiled on this device."""
    return COMPILE and device.type == "cuda"


def warn_unless_out_of_memory(what: str, error: Exception) -> None:
    """Print a line that a library's kernel cannot be used. Raises running out of memory again."""
    error = getattr(error, "inner_exception", error)  # which torch.compile wraps
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    print(f"{what} does not work here, a slower kernel is used: {reason}", file=sys.stderr)


def kernel(function: Callable) -> Callable:
    """Decorate a function of tensors, the first of which says on which device it runs."""
    works = True

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        nonlocal works
        if stand_in is not None:
            return stand_in(function, args)
        if not (works and runs_compiled(args[0].device)) or torch.compiler.is_compiling():
            return function(*args)
        try:
            # Detached: each combination of arguments that require gradients is compiled anew.
            return compiled(function)(*(x.detach() if isinstance(x, Tensor) else x for x in args))
        except RuntimeError as error:
            warn_unless_out_of_memory(f"torch.compile of {function.__name__}", error)
            works = False
            return function(*args)

    return call


@functools.cache
def compiled(function: Callable) -> Callable:
    """Compile a function: for each combination of dtypes, and then for any number of tokens."""
    import torch._dynamo  # slow to import

    torch._dynamo.config.recompile_limit = 64  # beyond it, functions run as they are written
    return torch.compile(function)


@kernel
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rope`."""
    if x.device.type == "cpu":
        return apply_rope(x, (cos, sin))
    # Equal to it, but without a copy of x in fp32, which is slower on the CPU.
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin).to(x.dtype)


@kernel
def rope_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate by the negative angles."""
    return rope.__wrapped__(grad, cos, -sin)


@kernel
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`RMSNorm.forward`."""
    return (weight * F.rms_norm(x, weight.shape, eps=eps).to(x.dtype)).to(x.dtype)


@kernel
def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and, if it is needed, of the weight."""
    # y = x r with r = 1 / sqrt(mean(x^2) + eps): dx = r dy - x r^3 mean(x dy)
    wide, grad_normed = x.float(), (grad * weight).float()
    size = x.size(-1)
    r = torch.linalg.vecdot(wide, wide)[..., None].div_(size).add_(eps).rsqrt_()
    along = torch.linalg.vecdot(wide, grad_normed)[..., None].mul_(r**3 / size)
    grad_x = torch.addcmul(grad_normed.mul_(r), wide, along, value=-1).to(x.dtype)
    if not needs_weight:
        return grad_x, None
    return grad_x, (grad.float() * (wide * r).to(x.dtype)).flatten(0, -2).sum(0)


@kernel
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up"""
    return F.silu(gate).mul_(up)


@kernel
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


@kernel
def dequantize_nf4(codes: Tensor, absmax: Tensor, pairs: Tensor) -> Tensor:
    """Map (blocks, 32) bytes of two codes each to weights (blocks, 64), times `absmax`.

    `pairs` (256,) holds the two values that each byte stands for, as the bits of one number.
    """
    dtype, block = absmax.dtype, 2 * codes.size(1)
    if torch.compiler.is_compiling():  # a look-up for each weight, in the kernel that scales it
        values = pairs.view(dtype)[1:32:2]  # those of the low halves of the bytes 0 to 15
        halves = torch.stack((codes >> 4, codes & 15), dim=-1).flatten(1)
        return values[halves.int()] * absmax
    values = pairs.index_select(0, codes.flatten().int()).view(dtype)
    return values.view(-1, block).mul_(absmax)


@kernel
def to_fp8(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize (rows, columns) to e4m3, after multiplying each column by `factor` (columns,).

    Returns also the scales, (rows, 1) in fp32.
    """
    if factor is not None:
        x = x * factor.to(x.dtype)
    scale = x.abs().amax(dim=1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
    scale = scale.clamp(min=1e-12)
    return (x / scale).to(torch.float8_e4m3fn), scale


@kernel
def int8_matmul(x: Tensor, int8: Tensor, scale: Tensor) -> Tensor:
    """x (rows, in_features) times W^T, with a scale for each row of W (out_features,)."""
    if torch.compiler.is_compiling():  # reads W once for few rows, and makes no copy of it
        return ((x[:, None].float() * int8).sum(-1) * scale).to(x.dtype)
    return F.linear(x, int8.to(x.dtype)) * scale


@kernel
def masked(x: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """x * table[rows], with the dropout masks of `token_mask`."""
    return x * table.index_select(0, rows)


@kernel
def masked_both(x: Tensor, y: Tensor, table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mask two tensors alike, y in place."""
    mask = table.index_select(0, rows)
    return x * mask, y.mul_(mask)
