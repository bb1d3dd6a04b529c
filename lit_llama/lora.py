"""LoRA: Hu et al. 2021, arXiv 2106.09685. Files are in the format of Hugging Face PEFT, both ways."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.checkpoint import open_safetensors, read_tensors, replacing, save_tensors
from lit_llama.config import read_json
from lit_llama.dropout import token_dropout
from lit_llama.errors import UserError
from lit_llama.model import LLaMA, recompute

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


@dataclass
class LoRAConfig:
    """Low-rank adaptation. Raises UserError for values out of range.

    Args:
        r: rank of the update.
        alpha: the update is scaled by alpha / r.
        dropout: probability of dropping an input feature of the update, in training.
        targets: names of the linear layers to adapt, as a list: ["q_proj", "v_proj"]. Any of q_proj, k_proj, v_proj,
            o_proj, gate_proj, up_proj, down_proj, lm_head.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"--lora.r {self.r}: should be at least 1")
        if self.alpha <= 0:
            raise UserError(f"--lora.alpha {self.alpha}: should be more than 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--lora.dropout {self.dropout}: should be from 0 to less than 1")
        self.targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        if not self.targets:
            raise UserError("--lora.targets []: should name at least one linear layer")


class LoRALinear(nn.Module):
    """y = base(x) + alpha / r * dropout(x) A^T B^T  (section 4.1).

    A starts Kaiming-uniform with a = sqrt(5) and B at zero, so that at first y = base(x). `base` is frozen; A and B are
    fp32 and computed with in x's dtype.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float, name: str) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout, self.name = base, alpha / r, dropout, name
        place = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Linear(base.in_features, r, bias=False, **place)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        return self.base(x) + recompute(self.update, x)

    def update(self, x: Tensor) -> Tensor:
        """The low-rank term alone."""
        x = token_dropout(x, self.dropout, self.name) if self.training else x
        low_rank = F.linear(x, self.lora_A.weight.to(x.dtype)) * self.scaling  # (..., r)
        return F.linear(low_rank, self.lora_B.weight.to(x.dtype))


def apply_lora(model: LLaMA, config: LoRAConfig) -> None:
    """Put a `LoRALinear` around each target layer, in place, and freeze the base. Raises UserError: unknown target."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = dict.fromkeys(name.rpartition(".")[2] for name in linears)
    for target in config.targets:
        if target not in known:
            raise UserError(f"--lora.targets: no linear layer is called {target!r}. There are: {', '.join(known)}")
    freeze_base(model)
    for name, linear in linears.items():
        if name.rpartition(".")[2] in config.targets:
            _replace(model, name, LoRALinear(linear, config.r, config.alpha, config.dropout, name))


def freeze_base(model: LLaMA) -> None:
    """Switch off gradients of the LLaMA's own weights, not of what methods have added to it."""
    with torch.device("meta"):
        own = {name for name, _ in LLaMA(model.config).named_parameters()}
    for name, parameter in model.named_parameters():
        if name.replace(".base.", ".") in own:
            parameter.requires_grad_(False)


def merge_lora(model: LLaMA) -> None:
    """Give each base layer W' = W + alpha / r * B A, computed in fp32 and rounded once, and take the LoRAs out."""
    loras = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name, lora in loras.items():
        weight = lora.base.weight.float() + lora.scaling * (lora.lora_B.weight @ lora.lora_A.weight)
        # a new tensor, never in place: the old one may be the mapped file itself
        lora.base.weight = nn.Parameter(weight.detach().to(lora.base.weight.dtype), requires_grad=False)
        _replace(model, name, lora.base)


def save_lora(model: LLaMA, path: str | Path, config: LoRAConfig, base_model: str = "", template: str = "") -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (fp32) into the folder `path`, as PEFT does.

    `base_model` is the base's folder or hub name; `template`, that of the training, goes into the safetensors header.
    """
    path = Path(path)
    tensors = {
        PEFT_PREFIX + (name if name.startswith("lm_head.") else f"model.{name}"): parameter.detach().float().cpu()
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    if not tensors:
        raise ValueError("the model has no LoRA; call apply_lora first")
    kind = dict(peft_type="LORA", task_type="CAUSAL_LM", bias="none", fan_in_fan_out=False, inference_mode=True)
    sizes = dict(r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(config.targets))
    settings = json.dumps(kind | sizes | {"base_model_name_or_path": base_model}, indent=2) + "\n"
    with replacing(path / WEIGHTS_FILE) as file:
        save_tensors(tensors, file, template=template)
    with replacing(path / CONFIG_FILE) as file:
        file.write_text(settings, "utf-8")


def lora_template(path: str | Path) -> str | None:
    """The prompt template that a LoRA was trained with, None where its file does not say (PEFT's do not)."""
    with open_safetensors(Path(path) / WEIGHTS_FILE) as handle:
        return (handle.metadata() or {}).get("template") or None


def lora_base(path: str | Path) -> Path:
    """The folder of the base model that a LoRA names. Raises UserError where it is not on this machine."""
    base = read_lora_settings(Path(path)).get("base_model_name_or_path")
    for folder in (base, f"checkpoints/{base}"):
        if base and Path(folder).is_dir():
            return Path(folder)
    raise UserError(f"{path}: its base model {base!r} is no folder here. Give the base with --checkpoint_dir")


def load_lora(model: LLaMA, path: str | Path) -> LoRAConfig:
    """Put a saved LoRA (ours or PEFT's) around a model's layers, in place.

    Ranks and layers follow from the tensors in the file, so PEFT's `rank_pattern` and ways to name targets need no
    reading. Raises UserError where there is no LoRA, it is damaged, for another model or unsupported.
    """
    path = Path(path)
    settings = read_lora_settings(path)
    tensors, _ = read_tensors(path / WEIGHTS_FILE)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    # PEFT puts a copy of the base weight beside a LoRA on lm_head
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".base_layer.weight")}
    names = sorted({name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name})
    for stored in names:
        name = stored.removeprefix(PEFT_PREFIX).removeprefix("model.")
        pair = [tensors.pop(f"{stored}.lora_{side}.weight", None) for side in "AB"]
        if name not in linears or None in pair:
            raise UserError(f"{path}: has a LoRA for {stored}, the model has no such layer. It is for another model")
        linear, r = linears[name], pair[0].size(0)
        found, wanted = [tuple(tensor.shape) for tensor in pair], [(r, linear.in_features), (linear.out_features, r)]
        if found != wanted:
            raise UserError(f"{path}: {stored} has shapes {found}, the model asks for {wanted}")
        alphas = (settings.get("alpha_pattern") or {}).items()  # regular expressions of layers with another alpha
        own = (value for key, value in alphas if re.match(rf"(.*\.)?({key})$", stored.removeprefix(PEFT_PREFIX)))
        alpha = next(own, settings["lora_alpha"])
        lora = LoRALinear(linear, r, alpha, settings.get("lora_dropout", 0.0), name)
        with torch.no_grad():
            lora.lora_A.weight.copy_(pair[0])
            lora.lora_B.weight.copy_(pair[1])
        _replace(model, name, lora.train(model.training))
    if tensors:
        raise UserError(f"{path}: holds tensors that are no LoRA of a linear layer: {', '.join(sorted(tensors)[:3])}")
    freeze_base(model)
    targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return LoRAConfig(settings["r"], settings["lora_alpha"], settings.get("lora_dropout", 0.0), targets)


def read_lora_settings(path: Path) -> dict[str, Any]:
    """`adapter_config.json` of a LoRA folder. Raises UserError where it asks for something that is not supported."""
    file = path / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{path}: no {CONFIG_FILE} there. Train one: python finetune/lora.py --out_dir {path}")
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {settings.get('peft_type')!r}, not 'LORA'")
    unsupported = [
        *("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices"),
        *("layer_replication", "alora_invocation_tokens", "bias"),
    ]
    if str(settings.get("init_lora_weights")).startswith(("pissa", "olora", "corda")):
        unsupported.append("init_lora_weights")  # these change the base too: it is not the one that we have
    for key in unsupported:
        if settings.get(key) and settings[key] != "none":
            raise UserError(f"{file}: {key} is {settings[key]!r}, which is not supported")
    for key in ("r", "lora_alpha"):
        if not isinstance(settings.get(key), (int, float)) or settings[key] <= 0:
            raise UserError(f"{file}: {key} should be a positive number, is {settings.get(key)!r}")
    return settings


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
