"""Frozen linear layers in 8 or 4 bits: int8 and int4 for decoding, NF4 and fp8 for training.

Each holds W (out_features, in_features) quantized in buffers and computes y = x W^T + bias.
Gradients flow to x only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lit_llama.errors import UserError

FP8 = torch.float8_e4m3fn
NF4_BLOCK = 64  # weights that share a scale
# QLoRA (Dettmers et al. 2023, arXiv 2305.14314), appendix E: quantiles of a normal distribution.
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


class QuantizedLinear(nn.Module):
    """Base class; subclasses have `dequantize`. Computes in the dtype of the original weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    weight = property(lambda self: self.dequantize())

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        x = x.to(self.dtype)
        y = MatmulFunction.apply(x, self) if torch.is_grad_enabled() else self.matmul(x)
        return y if self.bias is None else y + self.bias

    def matmul(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize())

    def grad_matmul(self, grad: Tensor) -> Tensor:
        return grad @ self.dequantize()


class MatmulFunction(torch.autograd.Function):
    """x W^T that saves nothing: W is dequantized again in backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.matmul(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.grad_matmul(grad), None


class Int8Linear(QuantizedLinear):
    """One scale per row of W. Under torch.compile the conversion is fused with the matmul."""

    KERNEL_ROWS = 8  # most tokens for which torch's int8 kernel is faster on the CPU

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        scale = (weight.float().abs().amax(dim=1) / 127).clamp(min=1e-12)  # (out,)
        self.register_buffer("int8", (weight.float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(weight.dtype))

    def dequantize(self) -> Tensor:
        return self.int8.to(self.dtype) * self.scale[:, None]

    def matmul(self, x: Tensor) -> Tensor:
        # The kernel reads aligned blocks of 16 inputs, beyond the end of a row if they do not fit.
        # torch.compile cannot trace an offset, but makes buffers of its own.
        aligned = torch.compiler.is_compiling() or x.storage_offset() % 16 == 0
        fits = self.in_features % 16 == 0 and x.is_contiguous() and aligned
        if fits and x.device.type == "cpu" and x.dim() == 2 and len(x) <= self.KERNEL_ROWS:
            return torch._weight_int8pack_mm(x, self.int8, self.scale)
        return F.linear(x, self.int8.to(x.dtype)) * self.scale


class Int4Linear(QuantizedLinear):
    """A scale and a zero point per group of weights, for torch's int4 kernels (CUDA: sm80).

    A shape that does not fit the kernels is padded to the next one that does.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        multiple = 128 if weight.is_cuda else 32
        self.padding = -self.in_features % multiple, -self.out_features % 16
        if any(self.padding):  # by copies of the last row and column, which widen no group's range
            sizes = zip((self.in_features, self.out_features), self.padding, strict=True)
            columns, rows = (torch.arange(n + more).clamp(max=n - 1) for n, more in sizes)
            weight = weight[rows[:, None], columns]
        self.group = next(size for size in (128, 64, 32) if weight.size(1) % size == 0)
        groups = weight.float().unflatten(1, (-1, self.group))  # (out, groups, group)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-6)
        codes = ((groups - low) / scale).round().clamp(0, 15).flatten(1).to(torch.int32)
        # The kernels compute (code - 8) * scale + zero; that of CUDA in bf16 only.
        self.kernel_dtype = torch.bfloat16 if weight.is_cuda else self.dtype
        scales = torch.cat((scale, low + 8 * scale), dim=-1).transpose(0, 1).contiguous()
        self.register_buffer("scales", scales.to(self.kernel_dtype))  # (groups, out, 2)
        if weight.is_cuda:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            self.register_buffer("int4", torch._convert_weight_to_int4pack(pairs, 8))
        else:
            self.register_buffer("int4", torch._convert_weight_to_int4pack_for_cpu(codes, 1))

    def dequantize(self) -> Tensor:
        like = dict(dtype=self.kernel_dtype, device=self.int4.device)
        identity = torch.eye(self.in_features, **like)
        return self.run_kernel(identity).T.to(self.dtype).contiguous()

    def matmul(self, x: Tensor) -> Tensor:
        if self.kernel_dtype != self.dtype:
            return F.linear(x, self.dequantize())
        y = self.run_kernel(x.reshape(-1, self.in_features))
        return y.view(*x.shape[:-1], self.out_features)

    def run_kernel(self, x: Tensor) -> Tensor:  # (rows, in_features) -> (rows, out_features)
        inputs, outputs = self.padding
        x = F.pad(x, (0, inputs)) if inputs else x.contiguous()
        kernel = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
        y = kernel(x, self.int4, self.group, self.scales)
        return y[:, : self.out_features].contiguous() if outputs else y


class NF4Linear(QuantizedLinear):
    """4-bit NormalFloat (QLoRA, section 3): the nearest of 16 values times the block's maximum."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        values = torch.tensor(NF4_VALUES, device=weight.device)
        # Each row starts with a block of its own; zeros fill up its last one.
        padding = -self.in_features % NF4_BLOCK
        weight = F.pad(weight, (0, padding)) if padding else weight
        blocks = weight.float().reshape(-1, NF4_BLOCK)
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        midpoints = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(blocks / absmax.clamp(min=1e-12), midpoints).to(torch.uint8)
        self.register_buffer("nf4", codes[:, ::2] << 4 | codes[:, 1::2])  # (blocks, 32)
        self.register_buffer("absmax", absmax.to(self.dtype))  # (blocks, 1)
        # The two values that each possible byte stands for: one look-up unpacks both.
        self.register_buffer("pairs", torch.cartesian_prod(values, values).to(self.dtype))

    def dequantize(self) -> Tensor:
        values = F.embedding(self.nf4.int(), self.pairs).flatten(1)  # (blocks, 64)
        weight = (values * self.absmax).view(self.out_features, -1)
        return weight[:, : self.in_features]


class FP8Linear(QuantizedLinear):
    """FP8 (e4m3) with a scale per row of W (CUDA: from sm89).

    W is held once per direction, since the kernel reads its second factor by columns only.
    Activations and gradients are quantized row by row.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        fp8, scale = to_fp8(weight)
        self.register_buffer("fp8", fp8)  # (out, in)
        self.register_buffer("fp8_transposed", fp8.t().contiguous())
        self.register_buffer("scale", scale)  # (out, 1), fp32

    def dequantize(self) -> Tensor:
        return (self.fp8.float() * self.scale).to(self.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        fp8, scale = to_fp8(x.flatten(0, -2))
        y = torch._scaled_mm(fp8, self.fp8.t(), scale, self.scale.t(), out_dtype=x.dtype)
        # A LoRA adds to y in place, which autograd forbids for a view that a function returns.
        return y if x.dim() == 2 else y.unflatten(0, x.shape[:-1])

    def grad_matmul(self, grad: Tensor) -> Tensor:
        # The scales of W belong to the columns of grad, so they are applied before rounding.
        fp8, scale = to_fp8(grad.flatten(0, -2) * self.scale.t().to(grad.dtype))
        ones = torch.ones(1, self.in_features, device=grad.device)
        weight = self.fp8_transposed.t()
        grad_x = torch._scaled_mm(fp8, weight, scale, ones, out_dtype=grad.dtype)
        return grad_x.unflatten(0, grad.shape[:-1])


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (rows, columns) to e4m3. Returns also the scales, (rows, 1) in fp32."""
    scale = x.abs().amax(dim=1, keepdim=True).float() / torch.finfo(FP8).max
    scale = scale.clamp(min=1e-12)
    return (x / scale).to(FP8), scale


FOR_DECODING: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}
FOR_TRAINING: dict[str, type[QuantizedLinear]] = {"nf4": NF4Linear, "fp8": FP8Linear}


def quantization(name: str, known: dict[str, type[QuantizedLinear]]) -> type[QuantizedLinear]:
    """Return the class for a `--quantize` name. Raises UserError if it cannot be used here."""
    if name not in known:
        raise UserError(f"--quantize {name}: unknown. Known: {', '.join(known)}")
    # Scales per row on the CPU came with torch 2.13.
    if name == "fp8" and not torch.cuda.is_available() and torch.__version__ < (2, 13):
        raise UserError("--quantize fp8: on the CPU it needs torch 2.13 or later")
    return known[name]
