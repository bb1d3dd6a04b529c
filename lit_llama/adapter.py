"""LLaMA-Adapter: Zhang et al. 2023, arXiv 2303.16199, and v2: Gao et al. 2023, arXiv 2304.15010."""

# Version 1 gives the upper layers a few learned prompt vectors to attend to, behind a gate that
# starts closed. Version 2 also learns a scale and a bias for each linear layer, and the norms.

import math
import re

import torch
from torch import Tensor, nn

from lit_llama.args import AdapterConfig
from lit_llama.config import LLaMAConfig
from lit_llama.errors import UserError
from lit_llama.model import Context, LLaMA, RMSNorm
from lit_llama.wrapping import base_linears, init_device


class AdapterAttention(nn.Module):
    """Attention to the tokens, plus gated attention to a learned prompt (v1, section 3.2)."""

    # y = o_proj(softmax(q k^T / sqrt(d)) v + gate * softmax(q k_p^T / sqrt(d)) v_p)
    # k_p and v_p are the layer's own projections of the prompt, without positions. The softmaxes
    # are separate, so with a gate of zero the prompt changes nothing.

    def __init__(
        self, base: nn.Module, prompt_length: int, config: LLaMAConfig, device: torch.device
    ) -> None:
        super().__init__()
        self.base = base
        factory_kwargs = dict(device=device, dtype=torch.float32)
        prompt = torch.randn(prompt_length, config.hidden_size, **factory_kwargs)
        self.prompt = nn.Parameter(prompt)
        # One gate per head, zero-initialized: training starts from the base model.
        self.gate = nn.Parameter(torch.zeros(config.num_attention_heads, **factory_kwargs))

    def forward(self, hidden_states: Tensor, context: Context) -> Tensor:  # (tokens, hidden)
        query, key, value = self.base.project(hidden_states, context.rope)
        return self.base.o_proj(self.attend(query, key, value, context).flatten(1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """Attend to the tokens and to the prompt. Returns (tokens, heads, head_dim)."""
        attended = self.base.attend(query, key, value, context)
        return attended + self.attend_to_prompt(query)

    def attend_to_prompt(self, query: Tensor) -> Tensor:
        """Return the gated attention to the prompt, shaped as query (tokens, heads, head_dim)."""
        prompt = self.prompt.to(query.dtype)[None]  # (1, length, hidden)
        # (1, length, heads * head_dim) -> (heads, length, head_dim)
        key, value = (
            proj(prompt)[0].unflatten(-1, (-1, self.base.head_dim)).transpose(0, 1)
            for proj in (self.base.k_proj, self.base.v_proj)
        )
        groups = query.size(1) // key.size(0)
        key, value = (x.to(query.dtype).repeat_interleave(groups, dim=0) for x in (key, value))
        scores = query.transpose(0, 1) @ key.mT / math.sqrt(self.base.head_dim)
        attended = scores.softmax(dim=-1) @ value  # (heads, tokens, head_dim)
        return self.gate.to(query.dtype)[:, None] * attended.transpose(0, 1)


class AdapterV2Linear(nn.Module):
    """y = scale * (base(x) + bias), which start at one and zero (v2, section 3.2)."""

    def __init__(self, base: nn.Module, out_features: int, device: torch.device) -> None:
        super().__init__()
        self.base = base
        factory_kwargs = dict(device=device, dtype=torch.float32)
        self.adapter_scale = nn.Parameter(torch.ones(out_features, **factory_kwargs))
        self.adapter_bias = nn.Parameter(torch.zeros(out_features, **factory_kwargs))

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        y = self.base(x)
        return self.adapter_scale.to(y.dtype) * (y + self.adapter_bias.to(y.dtype))


def apply_adapter(model: LLaMA, config: AdapterConfig) -> None:
    """Wrap the attention of all layers from `start_layer` on, in place."""
    num_layers = len(model.layers)
    if config.start_layer >= num_layers:
        start = f"--adapter.start_layer {config.start_layer}"
        raise UserError(f"{start}: the model has {num_layers} layers, counted from 0")
    device = init_device(model.embed_tokens.weight)
    for layer in model.layers[config.start_layer :]:
        attention = layer.self_attn
        layer.self_attn = AdapterAttention(attention, config.prompt_length, model.config, device)


def apply_adapter_v2(model: LLaMA, config: AdapterConfig) -> None:
    """Apply version 1, wrap each linear layer, and train the norms in fp32, in place."""
    apply_adapter(model, config)
    for name, linear in base_linears(model).items():
        # Wrap what wraps the layer already: the adapter comes after a LoRA.
        name = re.sub(r"(\.base)+$", "", name)
        wrapped = model.get_submodule(name)
        device = init_device(linear.weight)
        model.set_submodule(name, AdapterV2Linear(wrapped, linear.out_features, device))
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight = nn.Parameter(module.weight.detach().float())
