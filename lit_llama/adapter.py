"""LLaMA-Adapter: Zhang et al. 2023, arXiv 2303.16199, and version 2: Gao et al. 2023, arXiv 2304.15010.

Version 1 gives the upper layers a few learned prompt vectors to attend to, apart from the tokens and behind a gate that
starts closed. Version 2 also learns a bias and a scale for each linear layer, and the norms.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.attention import KVCache, SampleLengths
from lit_llama.config import LLaMAConfig
from lit_llama.errors import UserError
from lit_llama.files import read_tensors
from lit_llama.methods import (
    WEIGHTS_FILE,
    base_linears,
    base_name,
    copy_into,
    place_of,
    read_settings,
    replace_module,
    save_method,
)
from lit_llama.model import LLaMA, RMSNorm, Rope, recompute

V1, V2 = "llama_adapter", "llama_adapter_v2"


@dataclass
class AdapterConfig:
    """LLaMA-Adapter. Raises UserError for values out of range.

    Args:
        prompt_length: learned prompt vectors in each layer.
        start_layer: the first layer, counted from 0, that has them.
    """

    prompt_length: int = 10
    start_layer: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length <= 2**14 or self.start_layer < 0:
            raise UserError(
                f"--adapter.prompt_length should be at least 1 and at most {2**14}, --adapter.start_layer at least 0"
            )


class AdapterAttention(nn.Module):
    """Attention over the tokens plus, with a softmax of its own and a gate, over a learned prompt (v1, section 3.2).

    o_proj(softmax(q k^T / sqrt(d)) v + gate * softmax(q k_p^T / sqrt(d)) v_p); k_p and v_p are the layer's own
    projections of the prompt, without positions. The gates, one a head, start at zero (zero-init attention).
    """

    def __init__(self, base: nn.Module, prompt_length: int, config: LLaMAConfig, device: torch.device) -> None:
        super().__init__()
        self.base = base
        place = dict(device=device, dtype=torch.float32)
        self.prompt = nn.Parameter(torch.randn(prompt_length, config.hidden_size, **place))
        self.gate = nn.Parameter(torch.zeros(config.num_attention_heads, **place))

    def forward(
        self, hidden_states: Tensor, rope: Rope, samples: SampleLengths | None, kv_cache: KVCache | None
    ) -> Tensor:
        query, key, value = self.base.project(hidden_states, rope)
        attended = self.base.attend(query, key, value, samples, kv_cache)
        attended = attended + recompute(self.attend_to_prompt, query)
        return self.base.o_proj(attended.flatten(1))

    def attend_to_prompt(self, query: Tensor) -> Tensor:
        """(tokens, heads, head_dim) -> the same."""
        prompt = self.prompt.to(query.dtype)[None]  # (1, length, hidden)
        projections = (self.base.k_proj, self.base.v_proj)
        key, value = (
            proj(prompt).unflatten(-1, (-1, self.base.head_dim)).transpose(1, 2).to(query.dtype) for proj in projections
        )  # each (1, key/value heads, length, head_dim)
        query = query.transpose(0, 1)[None]  # (1, heads, tokens, head_dim)
        attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=query.size(1) != key.size(1))
        return self.gate.to(query.dtype)[:, None] * attended[0].transpose(0, 1)


class AdapterV2Linear(nn.Module):
    """y = scale * (base(x) + bias), both learned, starting at one and zero (v2, section 3.2)."""

    def __init__(self, base: nn.Module, out_features: int, device: torch.device) -> None:
        super().__init__()
        self.base = base
        place = dict(device=device, dtype=torch.float32)
        self.adapter_scale = nn.Parameter(torch.ones(out_features, **place))
        self.adapter_bias = nn.Parameter(torch.zeros(out_features, **place))

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        y = self.base(x)
        return self.adapter_scale.to(y.dtype) * (y + self.adapter_bias.to(y.dtype))


def apply_adapter(model: LLaMA, config: AdapterConfig) -> None:
    """Give the attention of all layers from `start_layer` on a prompt, in place. Raises UserError."""
    if config.start_layer >= len(model.layers):
        raise UserError(f"--adapter.start_layer {config.start_layer}: the model has {len(model.layers)} layers")
    device = place_of(model.embed_tokens.weight)
    for layer in model.layers[config.start_layer :]:
        layer.self_attn = AdapterAttention(layer.self_attn, config.prompt_length, model.config, device)


def apply_adapter_v2(model: LLaMA, config: AdapterConfig) -> None:
    """Version 1's prompts, a bias and a scale for each linear layer, and norms that train in fp32. Raises UserError."""
    apply_adapter(model, config)
    for name, linear in base_linears(model).items():
        outermost = re.sub(r"(\.base)+$", "", name)  # with the LoRA around it
        module = model.get_submodule(outermost)
        replace_module(model, outermost, AdapterV2Linear(module, linear.out_features, place_of(linear.weight)))
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight = nn.Parameter(module.weight.detach().float())


def save_adapter(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    config: AdapterConfig,
    model: LLaMA,
    base_model: str = "",
    template: str = "",
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (fp32) into the folder `path`.

    `tensors` are the model's parameters by name, of which the adapter's are taken; the other arguments are
    `save_lora`'s.
    """
    names = adapter_names(model)
    own = {base_name(name): tensor for name, tensor in tensors.items() if base_name(name) in names}
    shape = {key: getattr(model.config, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    settings = dict(method=version(model)) | asdict(config) | shape | dict(base_model_name_or_path=base_model)
    save_method(path, settings, own, template)


def load_adapter(model: LLaMA, path: str | Path) -> AdapterConfig:
    """Apply a saved adapter, of either version, to a model, in place.

    Raises UserError where there is none, it is damaged or for another model.
    """
    settings = read_settings(path, "method", (V1, V2), "finetune/adapter.py")
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if settings.get(key) != getattr(model.config, key):
            found = f"{key} is {settings.get(key)!r}, the model has {getattr(model.config, key)}"
            raise UserError(f"{path}: {found}. It is for another model")
    sizes = {key: settings.get(key) for key in ("prompt_length", "start_layer")}
    if not all(type(size) is int for size in sizes.values()):
        raise UserError(f"{path}: prompt_length and start_layer should be integers, are {list(sizes.values())}")
    tensors, _ = read_tensors(Path(path) / WEIGHTS_FILE)
    # looked at before memory for as many is asked for
    prompts = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith(".prompt")}
    wanted = (sizes["prompt_length"], model.config.hidden_size)
    for name, shape in prompts.items():
        if shape != wanted:
            raise UserError(f"{path}: {name} has shape {shape}, the model asks for {wanted}. It is for another model")
    if not prompts or not 0 <= sizes["start_layer"] < len(model.layers):
        found = f"start_layer is {sizes['start_layer']} of {len(model.layers)}, with {len(prompts)} prompts"
        raise UserError(f"{path}: {found}. It is for another model, or damaged")
    config = AdapterConfig(**sizes)
    {V1: apply_adapter, V2: apply_adapter_v2}[settings["method"]](model, config)
    copy_into(model, tensors, adapter_names(model), path)
    return config


def adapter_names(model: LLaMA) -> set[str]:
    """What an adapter has put into the model or trains in it: parameters' names, without `base`."""
    kinds = (AdapterAttention, AdapterV2Linear, *((RMSNorm,) if version(model) == V2 else ()))
    return {
        base_name(f"{prefix}.{leaf}")
        for prefix, module in model.named_modules()
        if isinstance(module, kinds)
        for leaf, _ in module.named_parameters(recurse=False)
    }


def version(model: LLaMA) -> str:
    """V1 or V2, whichever was applied."""
    return V2 if any(isinstance(module, AdapterV2Linear) for module in model.modules()) else V1
