"""Inference optimizations: fused projections, prepacked weights, CUDA graphs, torch.compile."""

import weakref
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from itertools import chain, pairwise, zip_longest

import torch
from torch import Tensor, nn

from lit_llama.errors import UserError
from lit_llama.fast import kernels
from lit_llama.fast.packing import PackedLinear, can_pack
from lit_llama.fast.quantization import FOR_DECODING, Int8Linear, VNNILinear, quantization
from lit_llama.kv_cache import KVCache
from lit_llama.model import MLP, Attention, LLaMA, PackedSequences, RMSNorm, Rope, apply_rope
from lit_llama.multi_lora import MultiLoRATable, multi_lora_layers
from lit_llama.wrapping import base_name


@torch.no_grad()
def optimize_for_inference(
    model: LLaMA,
    device: torch.device,
    quantize: str | None = None,
    fast_paths: bool = True,
    compile: bool = False,
) -> None:
    """Move a loaded model to `device` and optimize it layer by layer, in place.

    Call it after methods are applied or merged. The model can only be used for inference then.
    `fast_paths` fuses projections, prepacks bf16 weights (CPU) and records a step as a graph
    (CUDA). `quantize` is "int8" or "int4"; with int4, the head is int8, or stays as it is on a GPU
    without compiled kernels. Raises UserError for bf16 on a GPU that has none.
    """
    is_bf16 = model.embed_tokens.weight.dtype == torch.bfloat16
    if device.type == "cuda" and is_bf16 and not torch.cuda.is_bf16_supported(False):
        problem = f"{torch.cuda.get_device_name(device)} has no bf16, Ampere was first"
        raise UserError(f"--precision bf16-true: {problem}. Pass --precision 32-true")
    on_cpu = device.type == "cpu" and fast_paths and not compile
    form = head_form = None  # of the linear layers, if they are replaced
    if quantize is not None:
        form = quantization(quantize, FOR_DECODING)
        reads_int8 = device.type == "cpu" or kernels.runs_compiled(device)
        if form is Int8Linear or reads_int8:
            head_form = Int8Linear
    elif on_cpu and can_pack(model.embed_tokens.weight.dtype):
        form = head_form = PackedLinear
    if head_form is not None and model.lm_head is None:  # a tied head gets a form of its own
        model.lm_head = _linear(model.embed_tokens.weight, None)
    # Layer by layer, so that few weights exist twice.
    for part in (*model.layers, model):
        if fast_paths and part is not model:
            _fuse(part.self_attn, FusedAttention, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
            _fuse(part.mlp, FusedMLP, "gate_up_proj", ("gate_proj", "up_proj"))
        for name, linear in list(part.named_modules()) if form else ():
            make = head_form if base_name(name) == "lm_head" else form
            is_own = base_name(name).endswith(("_proj", "lm_head"))
            if isinstance(linear, nn.Linear) and is_own and make is not None:
                if make is Int8Linear and on_cpu and VNNILinear.pays(linear.weight):
                    make = VNNILinear
                bias = None if linear.bias is None else linear.bias.detach().to(device)
                part.set_submodule(name, make(linear.weight.detach().to(device), bias))
    for norm in model.modules() if on_cpu else ():
        if type(norm) is RMSNorm and norm.weight.dtype == model.embed_tokens.weight.dtype:
            norm.__class__ = OneTokenRMSNorm
    model.to(device)
    if compile or (fast_paths and device.type == "cuda"):
        model.__class__ = StaticLLaMA
        model.compile_step = compile


class FusedAttention(Attention):
    """Attention with one projection for query, key and value, and one rotation."""

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        query_heads, key_heads, value_heads = (size // self.head_dim for size in self.sizes)
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        rotated, value = heads.split((query_heads + key_heads, value_heads), dim=-2)
        query, key = apply_rope(rotated, rope).split((query_heads, key_heads), dim=-2)
        return query, key, value


class FusedMLP(MLP):
    """SwiGLU with one projection for gate and up."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)


class OneTokenRMSNorm(RMSNorm):
    """RMSNorm on the CPU that takes three operations for one token, in place of ten."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != x.size(-1):
            return super().forward(x)
        norm = torch.linalg.vector_norm(x, dtype=torch.float32).item()
        return self.weight * (x * (norm * norm / x.size(-1) + self.eps) ** -0.5)


def _fuse(module: nn.Module, fused: type[nn.Module], name: str, parts: tuple[str, ...]) -> None:
    """Make one linear layer of these, in place, unless a method wraps them."""
    linears = [getattr(module, part, None) for part in parts]
    if type(module) is not fused.__base__ or {type(linear) for linear in linears} != {nn.Linear}:
        return
    module.sizes = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    setattr(module, name, _linear(weight, bias))
    for part in parts:
        delattr(module, part)
    module.__class__ = fused


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


class StaticLLaMA(LLaMA):
    """A LLaMA that decodes with a static cache and records or compiles the step of one token."""

    compile_step = False
    step: "DecodeStep | None" = None

    @torch.inference_mode(False)  # so that it can also be written to outside of that mode
    @torch.no_grad()
    def make_kv_cache(self, batch_size: int, max_seq_length: int) -> KVCache:
        """Lend the cache of the last prompts, with its recorded step, if its size is the same.

        The length is rounded up to a power of two, so that few sizes are recorded or compiled.
        """
        size = batch_size, max(16, 1 << (max_seq_length - 1).bit_length())
        make = partial(StaticKVCache, self.config, *size, self.embed_tokens.weight.device)
        dtype = self.embed_tokens.weight.dtype
        if self.step is not None and self.step.lent() is not None:
            return make(dtype)  # for a second answer meanwhile, which is not recorded
        if self.step is None or self.step.kv_cache.size != size:
            self.step = None  # frees the old cache before the new one is allocated
            self.step = DecodeStep(self, make(dtype), self.compile_step)
        return self.step.lend()

    def forward(
        self, input_ids: Tensor, *args: object, kv_cache: KVCache | None = None, **kwargs: object
    ) -> Tensor:
        is_lent = self.step is not None and self.step.lent() is kv_cache is not None
        is_static = isinstance(kv_cache, StaticKVCache)
        was_empty = is_static and kv_cache.empty
        # A prompt that continues a cache has more tokens, or asks for the logits of some only.
        if is_lent and not (was_empty or args or kwargs or input_ids.size(-1) > 1):
            logits = self.step(input_ids)
        else:
            if is_lent:
                self.step.check_loras()
            logits = super().forward(input_ids, *args, kv_cache=kv_cache, **kwargs)
        if is_static and not was_empty:
            kv_cache.length += input_ids.size(-1)
        return logits


class StaticKVCache(KVCache):
    """A cache whose decoding step has the same shapes each time, for torch.compile and CUDA graphs.

    Attention looks at all of `max_seq_length`, with a mask. Only the device knows the lengths.
    """

    @property
    def size(self) -> tuple[int, int]:
        return self.keys.size(1), self.keys.size(3)

    def allocate(self, new_tokens: int, seqs: PackedSequences | None = None) -> Tensor:
        positions = super().allocate(new_tokens, seqs)
        if self.mask is not None:
            # Attention on a GPU takes a mask that is added. Make it once, not in each layer.
            hidden = torch.zeros(self.mask.shape, dtype=self.keys.dtype, device=self.mask.device)
            self.mask = hidden.masked_fill_(~self.mask, -torch.inf)
        return positions

    def visible_length(self, new_tokens: int) -> int:
        return self.keys.size(3)

    def advance(self) -> None:
        if self.seqs is not None:
            super().advance()
        else:
            self.lengths += self.new_tokens

    def truncate(self, lengths: list[int]) -> None:
        recorded = self.lengths
        super().truncate(lengths)
        self.lengths = recorded.copy_(self.lengths)  # at the address that a recorded step reads
        self.uniform = False  # so that tokens are stored by index, and masked


class DecodeStep:
    """Logits of one more token per row. On a GPU, the step is recorded once and replayed.

    Replaying a CUDA graph costs the host one call instead of a thousand. With `compile`,
    torch.compile fuses the step first, which takes up to a minute. The step is kept together with
    its cache, which it lends to one decoding after the other.
    """

    def __init__(self, model: LLaMA, kv_cache: StaticKVCache, compile: bool) -> None:
        self.model, self.kv_cache = model, kv_cache
        # To the step, the cache looks the same whatever it holds: the device knows the lengths.
        kv_cache.length, kv_cache.uniform = 1, False
        self.lent: Callable[[], StaticKVCache | None] = lambda: None
        self.token = kv_cache.lengths.clone()[:, None]
        self.compute = LLaMA.forward
        if compile:
            torch.compiler.reset()  # forget other sizes: their number is limited
            self.compute = torch.compile(LLaMA.forward, fullgraph=True, dynamic=False)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loras: list[object] = []  # those in use

    def lend(self) -> StaticKVCache:
        """Return an empty cache in the memory that the step reads."""
        kv_cache = copy(self.kv_cache)
        for tensor in (kv_cache.keys, kv_cache.values, kv_cache.lengths):
            tensor.zero_()
        kv_cache.length = 0
        self.lent = weakref.ref(kv_cache)
        return kv_cache

    def check_loras(self) -> None:
        """Drop the recorded graph if other LoRAs are in use than when it was recorded."""
        layers = multi_lora_layers(self.model).values()
        loras = [x.used if isinstance(x, MultiLoRATable) else x.scaling for x in layers]
        if any(new is not old for new, old in zip_longest(loras, self.loras)):
            self.loras, self.graph = loras, None

    def run(self) -> Tensor:
        return self.compute(self.model, self.token, kv_cache=self.kv_cache)

    def __call__(self, token: Tensor) -> Tensor:
        """Map (batch, 1) to logits (batch, 1, vocab_size), valid until the next call."""
        self.token.copy_(token)
        if not self.token.is_cuda:
            return self.run()
        if self.graph is None:
            self.record()
        self.graph.replay()
        return self.logits

    def record(self) -> None:
        """Warm up on a side stream, capture the CUDA graph, and reset the cache lengths."""
        lengths = self.kv_cache.lengths.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run()
                self.kv_cache.lengths.copy_(lengths)  # the next run overwrites the same position
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.run()
        self.kv_cache.lengths.copy_(lengths)


def copy_to_cpu_async(tokens: Iterator[Tensor]) -> Iterator[Tensor]:
    """Copy tokens from the GPU to the CPU, each while the GPU computes the next one."""
    # Launch the next step first, then wait until the copy of this step's tokens is complete.
    event = lambda: torch.cuda.current_stream().record_event()  # noqa: E731
    copies = ((token.to("cpu", non_blocking=True), event()) for token in tokens)
    for (on_cpu, copied), _ in pairwise(chain(copies, [None])):
        copied.synchronize()
        yield on_cpu
