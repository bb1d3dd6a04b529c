"""Folders in the layout of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors.

A LoRA is in PEFT's own format, both ways. Our other methods use the same two files.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llama.args import LoRAConfig
from lit_llama.config import read_json
from lit_llama.errors import UserError
from lit_llama.lora import ALL_LINEAR, LoRALinear
from lit_llama.model import LLaMA
from lit_llama.multi_lora import LoRAWeights
from lit_llama.storage import files
from lit_llama.storage.model_folder import transformers_name
from lit_llama.wrapping import base_linears, base_name

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before the names of transformers
# Settings that change what a LoRA computes, in ways that `LoRALinear` does not.
UNSUPPORTED = (
    *("bias", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices"),
    *("layer_replication", "alora_invocation_tokens"),
)


def save_adapter_folder(
    path: str | Path, settings: dict[str, Any], tensors: Mapping[str, Tensor], template: str
) -> None:
    """Write both files; tensors in fp32, the prompt template into the safetensors metadata."""
    path = Path(path)
    stored = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    with files.atomic_write(path / WEIGHTS_FILE) as file:
        files.save_tensors(stored, file, template=template)
    with files.atomic_write(path / CONFIG_FILE) as file:
        file.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises UserError if it is missing."""
    path = Path(path)
    if (path / CONFIG_FILE).exists():
        return read_json(path / CONFIG_FILE)
    if checkpoints := sorted(path.glob("step-*[0-9]")):
        hint = f"Its newest result is in {checkpoints[-1]}; or continue with --resume"
        raise UserError(f"{path}: this run is not finished. {hint}")
    hint = f"Train one: python finetune/lora.py --out_dir {path}"
    raise UserError(f"{path}: no {CONFIG_FILE} there. {hint}")


def save_lora(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    config: LoRAConfig,
    base_model: str = "",
    template: str = "",
) -> None:
    """Save a LoRA in the PEFT format, with the base model's folder and the prompt template.

    `tensors` are parameters by name, such as `dict(model.named_parameters())`; those that do not
    belong to a LoRA are ignored.
    """
    own = {base_name(key): tensor for key, tensor in tensors.items() if ".lora_" in key}
    if not own:
        raise ValueError("the model has no LoRA; call apply_lora first")
    stored = {PREFIX + transformers_name(key): tensor for key, tensor in own.items()}
    targets = ALL_LINEAR if ALL_LINEAR in config.targets else list(config.targets)
    settings = dict(peft_type="LORA", task_type="CAUSAL_LM", bias="none", fan_in_fan_out=False)
    settings |= dict(inference_mode=True, r=config.r, lora_alpha=config.alpha)
    settings |= dict(lora_dropout=config.dropout, target_modules=targets)
    settings |= dict(use_rslora=config.use_rslora, use_dora=config.use_dora)
    settings |= dict(base_model_name_or_path=base_model)
    # Combined LoRAs differ in rank from layer to layer; scaling is alpha / r everywhere.
    end = ".lora_A.weight"
    ranks = {key.removesuffix(end): len(a) for key, a in own.items() if key.endswith(end)}
    if ranks := {key: r for key, r in ranks.items() if r != config.r}:
        alphas = {key: config.alpha * r / config.r for key, r in ranks.items()}
        settings |= dict(rank_pattern=ranks, alpha_pattern=alphas)
    save_adapter_folder(path, settings, stored, template)


@torch.no_grad()
def load_lora(model: LLaMA, path: str | Path) -> LoRAConfig:
    """Apply a saved LoRA, ours or PEFT's, in place. Raises UserError as `read_lora` does."""
    linears = {base_name(name): (name, linear) for name, linear in base_linears(model).items()}
    shapes = {key: (layer.out_features, layer.in_features) for key, (_, layer) in linears.items()}
    config, layers = read_lora(Path(path), shapes)
    for key, weights in layers.items():
        name, linear = linears[key]
        r = len(weights.a)
        lora = LoRALinear(linear, r, weights.scaling, config.dropout, key, config.use_dora)
        lora.lora_A.weight.copy_(weights.a)
        lora.lora_B.weight.copy_(weights.b)
        if config.use_dora:
            lora.lora_magnitude_vector.copy_(weights.magnitude)
        model.set_submodule(name, lora.train(model.training))
    return config


def read_lora(
    path: Path, shapes: Mapping[str, tuple[int, int]]
) -> tuple[LoRAConfig, dict[str, LoRAWeights]]:
    """Read a saved LoRA, ours or PEFT's: its settings and the weights of each adapted layer.

    Layers and ranks follow from the tensors, so PEFT's `target_modules` and `rank_pattern` are not
    needed. `shapes` are (out_features, in_features) of the model's layers by checkpoint name.

    Raises UserError if the folder holds no LoRA, one of another model, or an unsupported kind.
    """
    settings = read_settings(path)
    _check_settings(settings, path / CONFIG_FILE)
    tensors, _ = files.read_tensors(path / WEIGHTS_FILE)
    # PEFT stores a copy of the base weight beside a LoRA on lm_head.
    tensors = {key: t for key, t in tensors.items() if not key.endswith(".base_layer.weight")}
    use_rslora, use_dora = (bool(settings.get(key)) for key in ("use_rslora", "use_dora"))
    alphas = settings.get("alpha_pattern") or {}
    layers = {}
    for stored in sorted({key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key}):
        layer = stored.removeprefix(PREFIX)
        name = layer.removeprefix("model.")
        keys = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        a, b, magnitude = (tensors.pop(f"{stored}.{key}", None) for key in keys)
        found = [None if t is None else tuple(t.shape) for t in (a, b, magnitude)]
        out_features, in_features = shapes.get(name, (0, 0))
        r = 0 if a is None else len(a)
        expected = [(r, in_features), (out_features, r), (out_features,) if use_dora else None]
        if found != expected:
            problem = f"{stored} has shapes {found}, the model's layer needs {expected}"
            raise UserError(f"{path}: {problem}. It belongs to another model")
        # A key of PEFT's alpha_pattern is the end of a layer's name, or a regular expression.
        matches = (v for key, v in alphas.items() if re.match(rf"(.*\.)?({key})$", layer))
        alpha = next(matches, settings["lora_alpha"])
        scaling = alpha / (math.sqrt(r) if use_rslora else r)
        layers[name] = LoRAWeights(a, b, scaling, magnitude)
    if tensors or not layers:
        names = ", ".join(sorted(tensors)[:3])
        raise UserError(f"{path}: holds tensors that are not a LoRA of a linear layer: {names}")
    targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    dropout = settings.get("lora_dropout") or 0.0
    sizes = (settings["r"], settings["lora_alpha"], dropout)
    return LoRAConfig(*sizes, targets, use_rslora, use_dora), layers


def _check_settings(settings: dict[str, Any], file: Path) -> None:
    kind = settings.get("peft_type") or settings.get("method")
    if kind != "LORA" or not {"r", "lora_alpha"} <= settings.keys():
        raise UserError(f"{file}: peft_type is {kind!r}, not a LORA with r and lora_alpha")
    for key in UNSUPPORTED:
        if settings.get(key) and settings[key] != "none":
            raise UserError(f"{file}: {key} is {settings[key]!r}, which is not supported")
    start = settings.get("init_lora_weights")
    if str(start).startswith(("pissa", "olora", "corda")):  # these change the base weights, too
        raise UserError(f"{file}: init_lora_weights is {start!r}, which is not supported")
