"""Frozen linear layers in 8 or 4 bits: int8 and int4 for decoding, NF4 and fp8 under a method that trains.

Each keeps what it needs of W (out_features, in_features) in buffers and computes y = x W^T + bias; gradients reach x.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lit_llama.errors import UserError

FP8 = torch.float8_e4m3fn
# QLoRA (Dettmers et al. 2023, arXiv 2305.14314), appendix E: quantiles of a normal distribution, scaled to [-1, 1]
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NF4_BLOCK = 64  # weights that share a scale


class QuantizedLinear(nn.Module, ABC):
    """What the kinds below have in common. `dtype`, that of the weight it is made from, is what it computes in."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        (self.out_features, self.in_features), self.dtype = weight.shape, weight.dtype
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @abstractmethod
    def dequantize(self) -> Tensor:
        """W again, (out_features, in_features) in `dtype`."""

    @property
    def weight(self) -> Tensor:
        return self.dequantize()

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        y = self.matmul(x.to(self.dtype))
        return y if self.bias is None else y + self.bias

    def matmul(self, x: Tensor) -> Tensor:
        return MatmulDequantized.apply(x, self)


class MatmulDequantized(torch.autograd.Function):
    """x W^T with a W that exists only meanwhile, on the way back once more."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize())

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantize(), None


class Int8Linear(QuantizedLinear):
    """A scale for each row of W. Under torch.compile the conversion becomes part of the matmul."""

    KERNEL_ROWS = 8  # on the CPU, up to how many tokens torch's kernel for few of them is the faster way

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        scale = (weight.float().abs().amax(dim=1) / 127).clamp(min=1e-12)  # (out,)
        self.register_buffer("int8", (weight.float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(weight.dtype))

    def dequantize(self) -> Tensor:
        return self.int8.to(self.dtype) * self.scale[:, None]

    def matmul(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dim() == 2 and len(x) <= self.KERNEL_ROWS:
            return torch._weight_int8pack_mm(x, self.int8, self.scale)
        return F.linear(x, self.int8.to(x.dtype)) * self.scale


class Int4Linear(QuantizedLinear):
    """A scale and a zero point for each `group` weights of a row, for torch's int4 kernels (CPU; CUDA from sm80)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self.group = next((size for size in (128, 64, 32) if self.in_features % size == 0), 0)
        multiple = 128 if weight.is_cuda else 32
        if not self.group or self.in_features % multiple or self.out_features % 16:
            shape = f"{self.out_features} x {self.in_features}"
            raise UserError(f"--quantize int4: a layer of {shape} does not fit the kernel. Use --quantize int8")
        groups = weight.float().unflatten(1, (-1, self.group))  # (out, groups, group)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-6)
        codes = ((groups - low) / scale).round().clamp(0, 15).flatten(1).to(torch.int32)
        # the kernels compute (code - 8) * scale + zero
        scales_and_zeros = torch.cat((scale, low + 8 * scale), dim=-1).transpose(0, 1).contiguous()
        self.register_buffer("scales_and_zeros", scales_and_zeros.to(weight.dtype))  # (groups, out, 2)
        if weight.is_cuda:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            self.register_buffer("int4", torch._convert_weight_to_int4pack(pairs, 8))
        else:
            self.register_buffer("int4", torch._convert_weight_to_int4pack_for_cpu(codes, 1))

    def dequantize(self) -> Tensor:
        identity = torch.eye(self.in_features, dtype=self.dtype, device=self.int4.device)
        return self.matmul(identity).T.contiguous()

    def matmul(self, x: Tensor) -> Tensor:
        kernel = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
        y = kernel(x.reshape(-1, self.in_features), self.int4, self.group, self.scales_and_zeros)
        return y.view(*x.shape[:-1], -1)


class NF4Linear(QuantizedLinear):
    """NormalFloat of 4 bits (QLoRA, section 3): the nearest of 16 values times the largest of each 64 weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        if self.in_features % NF4_BLOCK:
            raise UserError(f"--quantize nf4: a layer's {self.in_features} inputs are no multiple of {NF4_BLOCK}")
        values = torch.tensor(NF4_VALUES, device=weight.device)
        blocks = weight.float().reshape(-1, NF4_BLOCK)
        largest = blocks.abs().amax(dim=1, keepdim=True)
        borders = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(blocks / largest.clamp(min=1e-12), borders).to(torch.uint8)
        self.register_buffer("nf4", codes[:, ::2] << 4 | codes[:, 1::2])  # (blocks, 32)
        self.register_buffer("largest", largest.to(self.dtype))  # (blocks, 1)
        pairs = torch.cartesian_prod(values, values).to(self.dtype)
        self.register_buffer("pairs", pairs)  # (256, 2): what a byte stands for

    def dequantize(self) -> Tensor:
        pairs = F.embedding(self.nf4.int(), self.pairs)  # (blocks, 32, 2)
        return (pairs.flatten(1) * self.largest).view(self.out_features, self.in_features)


class FP8Linear(QuantizedLinear):
    """Both factors of each matmul in e4m3 with a scale per row: as the peak of recent GPUs asks for (from sm89).

    W is kept once for each direction, as the kernel reads the second factor by columns only.
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
        return MatmulFP8.apply(x.flatten(0, -2), self).unflatten(0, x.shape[:-1])


class MatmulFP8(torch.autograd.Function):
    """x W^T, x (tokens, in), and on the way back grad W; both round their first factor, row by row."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: FP8Linear) -> Tensor:
        ctx.layer = layer
        fp8, scale = to_fp8(x)
        return torch._scaled_mm(fp8, layer.fp8.t(), scale, layer.scale.t(), out_dtype=x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        fp8, scale = to_fp8(grad * layer.scale.t().to(grad.dtype))
        ones = torch.ones(1, layer.in_features, device=grad.device)
        return torch._scaled_mm(fp8, layer.fp8_transposed.t(), scale, ones, out_dtype=grad.dtype), None


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) -> the same in e4m3, and each row's scale (rows, 1) in fp32."""
    scale = (x.abs().amax(dim=1, keepdim=True).float() / torch.finfo(FP8).max).clamp(min=1e-12)
    return (x / scale).to(FP8), scale


FOR_DECODING: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}
FOR_TRAINING: dict[str, type[QuantizedLinear]] = {"nf4": NF4Linear, "fp8": FP8Linear}


def quantization(name: str, known: dict[str, type[QuantizedLinear]]) -> type[QuantizedLinear]:
    """The class that `--quantize` names. Raises UserError for an unknown one, or where this torch has no kernel."""
    if name not in known:
        raise UserError(f"--quantize {name}: unknown. Known: {', '.join(known)}")
    if name == "fp8" and not torch.cuda.is_available() and torch.__version__ < (2, 13):  # a scale per row
        raise UserError(f"--quantize fp8: on the CPU it needs torch 2.13 or later, this is {torch.__version__}")
    return known[name]
