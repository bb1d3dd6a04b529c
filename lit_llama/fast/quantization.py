"""Frozen linear layers in 8 or 4 bits: int8 and int4 for decoding, NF4 and fp8 for training.

Each holds W (out_features, in_features) quantized in buffers and computes y = x W^T + bias.
Gradients flow to x only.
"""

import importlib.util
import warnings
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lit_llama.errors import UserError
from lit_llama.fast import kernels

# Set to False to unpack NF4 by our own kernel on a GPU even if bitsandbytes is installed.
BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
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

    KERNEL_ROWS = 8  # most tokens for which a kernel that reads int8 is faster

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        scale = _int8_scale(weight)
        self.register_buffer("int8", (weight.float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(weight.dtype))

    def dequantize(self) -> Tensor:
        return self.int8.to(self.dtype) * self.scale[:, None]

    def matmul(self, x: Tensor) -> Tensor:
        # The kernel reads aligned blocks of 16 inputs, beyond the end of a row if they do not fit.
        # torch.compile cannot trace an offset, but makes buffers of its own.
        aligned = torch.compiler.is_compiling() or x.storage_offset() % 16 == 0
        fits = self.in_features % 16 == 0 and x.is_contiguous() and aligned
        few = x.dim() == 2 and len(x) <= self.KERNEL_ROWS
        if fits and few and x.device.type == "cpu":
            if self.dtype == torch.bfloat16 or torch.compiler.is_compiling():
                return torch._weight_int8pack_mm(x, self.int8, self.scale)
            # Of fp32 inputs, the kernel is slower than a matmul without quantization.
            x, scale = x.bfloat16(), self.scale.bfloat16()
            return torch._weight_int8pack_mm(x, self.int8, scale).to(self.dtype)
        if few and x.is_cuda:
            return kernels.int8_matmul(x, self.int8, self.scale)
        return F.linear(x, self.int8.to(x.dtype)) * self.scale


def _int8_scale(weight: Tensor) -> Tensor:
    """Return the scale of each row that maps its largest value to 127, (out_features,) in fp32."""
    return (weight.float().abs().amax(dim=1) / 127).clamp(min=1e-12)


class VNNILinear(QuantizedLinear):
    """int8 as above, with inputs that are rounded to 8 bits as well, with a scale for each token.

    For CPUs that multiply 8-bit integers (VNNI), by FBGEMM. Without these instructions its sums
    could overflow.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        scale, zero = _int8_scale(weight).double(), torch.zeros(len(weight), dtype=torch.long)
        int8 = (weight.float() / scale[:, None].float()).round().to(torch.int8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors, which only carry it to the packing
            per_row = torch._make_per_channel_quantized_tensor(int8, scale, zero, 0)
        self.packed = torch.ops.quantized.linear_prepack(per_row, None)

    @staticmethod
    def pays(weight: Tensor) -> bool:
        """Tell whether this is faster for a weight than `Int8Linear`."""
        # Not so for smaller ones. And the input of the MLP's down projection suffers from rounding.
        if weight.size(0) < 2 * weight.size(1):
            return False
        # a later torch may drop the function, and with it the engine
        has_engine = torch.backends.quantized.engine in ("x86", "fbgemm")
        has_engine = has_engine and hasattr(torch, "_make_per_channel_quantized_tensor")
        return has_engine and torch.cpu._is_vnni_supported()

    def dequantize(self) -> Tensor:
        return torch.ops.quantized.linear_unpack(self.packed)[0].dequantize().to(self.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        if x.numel() == self.in_features:
            return torch.ops.quantized.linear_dynamic(x.float(), self.packed).to(self.dtype)
        # The function has one scale for all tokens of a call, some of which are 100 times as large.
        size = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12)
        y = torch.ops.quantized.linear_dynamic(x / size, self.packed)
        return y.mul_(size).to(self.dtype)


class Int4Linear(QuantizedLinear):
    """A scale and a zero point per group of weights, for torch's int4 kernels (CUDA: sm80, bf16).

    A shape that does not fit the kernels is padded to the next one that does.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        if weight.is_cuda and weight.dtype != torch.bfloat16:
            raise UserError("--quantize int4: on a GPU with --precision bf16-true only")
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
        # The kernels compute (code - 8) * scale + zero.
        scales = torch.cat((scale, low + 8 * scale), dim=-1).transpose(0, 1).contiguous()
        self.register_buffer("scales", scales.to(self.dtype))  # (groups, out, 2)
        if weight.is_cuda:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            self.register_buffer("int4", torch._convert_weight_to_int4pack(pairs, 8))
        else:
            self.register_buffer("int4", torch._convert_weight_to_int4pack_for_cpu(codes, 1))

    def dequantize(self) -> Tensor:
        identity = torch.eye(self.in_features, dtype=self.dtype, device=self.int4.device)
        return self.run_kernel(identity).T.contiguous()

    def matmul(self, x: Tensor) -> Tensor:
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
        # The two values that each possible byte stands for, as one number: a look-up unpacks both.
        pairs = torch.cartesian_prod(values, values).to(self.dtype)  # (256, 2)
        whole = torch.int32 if pairs.element_size() == 2 else torch.int64
        self.register_buffer("pairs", pairs.view(whole)[:, 0])

    def dequantize(self) -> Tensor:
        weight = self.dequantize_by_bitsandbytes() if BITSANDBYTES and self.nf4.is_cuda else None
        if weight is None:
            weight = kernels.dequantize_nf4(self.nf4, self.absmax, self.pairs)
        return weight.view(self.out_features, -1)[:, : self.in_features]

    def dequantize_by_bitsandbytes(self) -> Tensor | None:
        """Return (blocks, 64) from the same layout; None if the package does not work here."""
        global BITSANDBYTES
        shape = torch.Size((len(self.nf4), NF4_BLOCK))
        kind = dict(blocksize=NF4_BLOCK, quant_type="nf4", dtype=self.dtype)
        try:
            from bitsandbytes.functional import QuantState, dequantize_4bit

            state = QuantState(self.absmax.float()[:, 0], shape, **kind)
            return dequantize_4bit(self.nf4.view(-1, 1), state)
        except (ImportError, AttributeError, RuntimeError) as error:  # built for another CUDA, say
            kernels.warn_unless_out_of_memory("NF4 of bitsandbytes", error)
            BITSANDBYTES = False
            return None


class FP8Linear(QuantizedLinear):
    """FP8 (e4m3) with a scale per row of W (CUDA: from sm89).

    W is held once per direction, since the kernel reads its second factor by columns only.
    Activations and gradients are quantized row by row.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        fp8, scale = kernels.to_fp8(weight)
        self.register_buffer("fp8", fp8)  # (out, in)
        self.register_buffer("fp8_transposed", fp8.t().contiguous())
        self.register_buffer("scale", scale)  # (out, 1), fp32
        self.register_buffer("one", torch.ones(1, self.in_features, device=weight.device))

    # The last input and what it was quantized to, for the other projections of the same input.
    last: tuple[Callable[[], Tensor | None], int, tuple[Tensor, Tensor]] = (lambda: None, 0, ())

    def dequantize(self) -> Tensor:
        return (self.fp8.float() * self.scale).to(self.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        last, version, quantized = FP8Linear.last
        if last() is not x or version != x._version:
            quantized = kernels.to_fp8(x.flatten(0, -2))
            FP8Linear.last = weakref.ref(x), x._version, quantized
        fp8, scale = quantized
        # Sums of fp8 products need no more than the faster of the two ways to accumulate them.
        options = dict(out_dtype=x.dtype, use_fast_accum=x.is_cuda)
        y = torch._scaled_mm(fp8, self.fp8.t(), scale, self.scale.t(), **options)
        # A LoRA adds to y in place, which autograd forbids for a view that a function returns.
        return y if x.dim() == 2 else y.unflatten(0, x.shape[:-1])

    def grad_matmul(self, grad: Tensor) -> Tensor:
        # The scales of W belong to the columns of grad, so they are applied before rounding.
        fp8, scale = kernels.to_fp8(grad.flatten(0, -2), self.scale[:, 0])
        weight = self.fp8_transposed.t()
        grad_x = torch._scaled_mm(fp8, weight, scale, self.one, out_dtype=grad.dtype)
        return grad_x.unflatten(0, grad.shape[:-1])


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
