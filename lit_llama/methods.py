"""What methods share: they change a LLaMA's modules in place, and keep what they have trained in a small folder.

A method that wraps a module calls it `base`; without that word the names are those of the checkpoint again.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_llama.config import read_json
from lit_llama.errors import UserError
from lit_llama.files import header_template, replacing, save_tensors
from lit_llama.model import LLaMA

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def base_name(name: str) -> str:
    """The name that a module or parameter of the LLaMA has where no method wraps anything."""
    return re.sub(r"\.base(?=\.|$)", "", name)


def base_parameters(model: LLaMA) -> dict[str, tuple[nn.Module, str]]:
    """The LLaMA's own parameters, not those that methods have added: checkpoint name -> module and attribute."""
    with torch.device("meta"):
        own = {name for name, _ in LLaMA(model.config).named_parameters()}
    places = {}
    for prefix, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            if (name := base_name(f"{prefix}.{leaf}")) in own:
                places[name] = (module, leaf)
    return places


def base_linears(model: LLaMA) -> dict[str, nn.Linear]:
    """The LLaMA's own linear layers, each under the name where it is now."""
    own = {id(module) for module, _ in base_parameters(model).values()}
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in own}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def place_of(weight: Tensor) -> torch.device:
    """Where a method's own parameters for a layer start: beside its weight, on the CPU while that has no memory yet."""
    return torch.device("cpu") if weight.is_meta else weight.device


def save_method(path: str | Path, settings: dict[str, Any], tensors: Mapping[str, Tensor], template: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (fp32) into the folder `path`, each whole.

    `template`, the prompt template of the training, goes into the header of the latter.
    """
    path = Path(path)
    stored = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path / WEIGHTS_FILE) as file:
        save_tensors(stored, file, template=template)
    with replacing(path / CONFIG_FILE) as file:
        file.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def read_settings(path: str | Path, key: str, kinds: tuple[str, ...], script: str) -> dict[str, Any]:
    """`adapter_config.json` of the folder `path`, with one of `kinds` under `key`. Raises UserError for another."""
    file = Path(path) / CONFIG_FILE
    if not file.exists():
        raise UserError(f"{path}: no {CONFIG_FILE} there. Train one: python {script} --out_dir {path}")
    settings = read_json(file)
    if settings.get(key) not in kinds:
        other = f" (but {settings['method']})" if "method" in settings and key != "method" else ""
        raise UserError(f"{file}: {key} is {settings.get(key)!r}{other}, not {' or '.join(kinds)}")
    return settings


def training_template(path: str | Path) -> str | None:
    """The prompt template that a method was trained with, None where its file does not say (PEFT's do not)."""
    return header_template(Path(path) / WEIGHTS_FILE)


def base_folder(path: str | Path) -> Path:
    """The folder of the base model that a method's folder names. Raises UserError where it is not on this machine."""
    file = Path(path) / CONFIG_FILE
    if not file.exists():
        raise UserError(f"{path}: no {CONFIG_FILE} there. Train one with finetune/*.py --out_dir {path}")
    base = read_json(file).get("base_model_name_or_path")
    for folder in (base, f"checkpoints/{base}"):
        if isinstance(base, str) and base and os.path.isdir(folder):  # Path.is_dir raises for names too long
            return Path(folder)
    raise UserError(f"{path}: its base model {base!r} is no folder here. Give the base with --checkpoint_dir")


@torch.no_grad()
def copy_into(model: LLaMA, tensors: Mapping[str, Tensor], names: Iterable[str], path: str | Path) -> None:
    """Copy saved tensors into the model's parameters `names` (without `base`). Raises UserError where they differ."""
    parameters = {base_name(name): parameter for name, parameter in model.named_parameters()}
    wanted = {name: tuple(parameters[name].shape) for name in names}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            shapes = f"{name} has shape {found.get(name)}, the model asks for {wanted.get(name)}"
            raise UserError(f"{path}: {shapes}. It is for another model, or damaged")
    for name in wanted:
        if not tensors[name].is_floating_point():
            raise UserError(f"{path}: {name} holds {tensors[name].dtype}, not floating-point numbers")
        parameters[name].copy_(tensors[name])
