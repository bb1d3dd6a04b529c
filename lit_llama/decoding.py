"""What makes decoding fast: a model's layers in other forms, and a step that a GPU replays. `--fast_paths false`, and
`generate` without `prepare`, decode with the model as it is.
"""

import torch
from torch import Tensor, nn

from lit_llama.attention import KVCache
from lit_llama.methods import base_linears, replace_module
from lit_llama.model import MLP, Attention, LLaMA, Rope, apply_rope, swiglu
from lit_llama.quantize import FOR_DECODING, Int8Linear, quantization


class PackedLinear(nn.Module):
    """A bf16 layer for the CPU whose weight lies as oneDNN reads it: at one token ahead by half of F.linear."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1), bias
        self.compute = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.bias, "none", [], "")


class FusedAttention(Attention):
    """Attention whose three projections are one, and so is the rotation of queries and keys."""

    def __init__(self, base: Attention) -> None:
        nn.Module.__init__(self)
        self.index, self.head_dim, self.o_proj = base.index, base.head_dim, base.o_proj
        parts = (base.q_proj, base.k_proj, base.v_proj)
        self.heads = [part.out_features // self.head_dim for part in parts]
        self.qkv_proj = join(*parts)

    def project(self, hidden_states: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        rotated, value = heads.split((self.heads[0] + self.heads[1], self.heads[2]), dim=-2)
        query, key = apply_rope(rotated, rope).split(self.heads[:2], dim=-2)
        return query, key, value


class FusedMLP(nn.Module):
    """SwiGLU whose gate and up projections are one."""

    def __init__(self, base: MLP) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = join(base.gate_proj, base.up_proj), base.down_proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(swiglu(*self.gate_up_proj(hidden_states).chunk(2, dim=-1)))


def join(*layers: nn.Linear) -> nn.Linear:
    """One layer that gives what these give, end to end."""
    with torch.device("meta"):
        joined = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers))
    joined.weight = frozen(torch.cat([layer.weight for layer in layers]))
    joined.bias = None if layers[0].bias is None else frozen(torch.cat([layer.bias for layer in layers]))
    return joined


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


@torch.no_grad()
def prepare(
    model: LLaMA, device: torch.device, quantize: str | None = None, fast_paths: bool = True, compile: bool = False
) -> None:
    """Move a loaded (and merged) model to `device`, in place and layer by layer, each in its form for decoding.

    Args:
        model: on the CPU or on `device` already; it can only decode from then on.
        device: where to.
        quantize: int8 or int4 for the linear layers; with int4 the head is int8. Raises UserError for another one.
        fast_paths: pack bf16 weights on the CPU; make one projection of query, key and value, and of gate and up.
        compile: whether torch.compile will do the packing.
    """
    linears = set(base_linears(model).values())
    for layer in model.layers if fast_paths else ():
        attention, mlp = layer.self_attn, layer.mlp
        if type(attention) is Attention and are_plain(attention.q_proj, attention.k_proj, attention.v_proj):
            layer.self_attn = FusedAttention(attention)
            linears.add(layer.self_attn.qkv_proj)
        if are_plain(mlp.gate_proj, mlp.up_proj):
            layer.mlp = FusedMLP(mlp)
            linears.add(layer.mlp.gate_up_proj)
    kind = None if quantize is None else quantization(quantize, FOR_DECODING)
    packs = fast_paths and not compile and device.type == "cpu" and can_pack(model.embed_tokens.weight.dtype)
    if model.lm_head is None and (kind or packs):  # a tied head gets a form of its own
        with torch.device("meta"):
            model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
        model.lm_head.weight = model.embed_tokens.weight
        linears.add(model.lm_head)
    for name, module in list(model.named_modules()):
        if module not in linears:
            continue
        weight, bias = (None if t is None else t.detach().to(device) for t in (module.weight, module.bias))
        if kind is not None:
            replace_module(model, name, (Int8Linear if module is model.lm_head else kind)(weight, bias))
        elif packs:
            replace_module(model, name, PackedLinear(weight, bias))
        else:
            module.weight, module.bias = frozen(weight), None if bias is None else frozen(bias)
    model.to(device)


def are_plain(*layers: nn.Module) -> bool:
    """Whether no method is at work in any of them."""
    return all(type(layer) is nn.Linear for layer in layers)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for the dtype that this CPU runs well."""
    return (
        dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class DecodeStep:
    """`model(token)[:, -1]` for a token a row. With a static cache on a GPU it is recorded once and replayed.

    What is recorded (a CUDA graph) costs the host one call instead of a thousand. With `compile`, torch.compile fuses
    it first, which takes up to a minute.
    """

    def __init__(self, model: LLaMA, kv_cache: KVCache, compile: bool = False) -> None:
        self.token = torch.zeros(kv_cache.keys.size(1), 1, dtype=torch.long, device=kv_cache.keys.device)
        self.model, self.kv_cache = model, kv_cache
        self.step = torch.compile(self.forward, fullgraph=True, dynamic=False) if compile else self.forward
        self.graph = None

    def forward(self) -> Tensor:
        return self.model(self.token, kv_cache=self.kv_cache)[:, -1]

    def record(self) -> None:
        """Run the step three times aside, as capturing asks for, record it, and take back what that has stored."""
        lengths = self.kv_cache.lengths.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.step()
                self.kv_cache.lengths.copy_(lengths)  # there must be room, and the next token overwrites
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.step()
        self.kv_cache.lengths.copy_(lengths)

    def __call__(self, token: Tensor) -> Tensor:
        """(batch,) -> logits (batch, vocab_size), good until the next call."""
        self.token.copy_(token[:, None])
        if self.kv_cache.static and self.token.is_cuda:
            if self.graph is None:
                self.record()
            self.graph.replay()
            return self.logits
        return self.step()
