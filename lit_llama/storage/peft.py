"""Folders in the layout of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors.

A LoRA is in PEFT's own format, both ways. Our other methods use the same two files.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llama.args import LoRAConfig
from lit_llama.config import LLaMAConfig, read_json
from lit_llama.errors import UserError
from lit_llama.lora import ALL_LINEAR
from lit_llama.model import LLaMA
from lit_llama.multi_lora import LoRAWeights
from lit_llama.storage import files
from lit_llama.storage.model_folder import EMBEDDING, HEAD, transformers_name
from lit_llama.wrapping import base_name

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"  # PEFT's before 0.7
PREFIX = "base_model.model."  # PEFT's, before the names of transformers
# Settings that change what a LoRA computes, in ways that `LoRALinear` does not.
UNSUPPORTED = (
    *("lora_bias", "target_parameters", "layer_replication", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
# Initializations that change the base weights, too.
UNSUPPORTED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Parts of names that torch.compile, activation checkpointing, FSDP and DDP add.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_(checkpoint|fsdp)_wrapped_module|module)\.")
# In the names of PEFT's tensors: a LoRA's, with or without the name of the adapter...
LORA_TENSOR = re.compile(
    r"(?P<layer>.+)\.lora_(?:embedding_)?(?P<kind>A|B|magnitude_vector)"
    r"(\.(?!bias$)[^.]+)??(\.weight)?"
)
# ... the base's, where PEFT wraps a layer, those trained whole, and rows of trained tokens
BASE_TENSOR = re.compile(r"\.(token_adapter\.)?(base_layer|original_module)(?=\.(weight|bias)$)")
SAVED_TENSOR = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.(weight|bias)$)")
TOKENS_TENSOR = re.compile(r"(?P<layer>.+)\.token_adapter\.trainable_tokens_delta(\..+)?")


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
    if inner := sorted(path.glob(f"*/{CONFIG_FILE}")):  # checkpoints of a trainer
        hint = f"There is one in {inner[-1].parent}"
    raise UserError(f"{path}: no {CONFIG_FILE} there. {hint}")


def has_adapter(path: Path) -> bool:
    """Check for a LLaMA-Adapter trained beside a LoRA, and not a LoRA of that name."""
    folder = path / "adapter"
    if not (folder / CONFIG_FILE).is_file():
        return folder.is_dir()
    return "method" in read_json(folder / CONFIG_FILE)


def save_lora(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    config: LoRAConfig,
    base_model: str = "",
    template: str = "",
    scalings: Mapping[str, float] | None = None,
) -> None:
    """Save a LoRA in the PEFT format, with the base model's folder and the prompt template.

    `tensors` are parameters by name, such as `dict(model.named_parameters())`; those that do not
    belong to a LoRA are ignored. `scalings` are those of the layers, if they differ.
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
    # Combined LoRAs differ in rank from layer to layer, those of PEFT in scaling, too.
    end, patterns = ".lora_A.weight", {"rank_pattern": {}, "alpha_pattern": {}}
    for key, r in ((key.removesuffix(end), len(a)) for key, a in own.items() if key.endswith(end)):
        divisor = math.sqrt if config.use_rslora else float
        alpha = (scalings or {}).get(key, config.alpha / divisor(config.r)) * divisor(r)
        if r != config.r:
            patterns["rank_pattern"][key] = r
        if not math.isclose(alpha, config.alpha):
            patterns["alpha_pattern"][key] = alpha
    settings |= {key: pattern for key, pattern in patterns.items() if pattern}
    save_adapter_folder(path, settings, stored, template)


@dataclass
class SavedLoRA:
    """The content of a LoRA's folder. Names are checkpoint names."""

    path: Path
    config: LoRAConfig
    # updates by layer; that of the embedding is one of its transposed weight
    layers: dict[str, LoRAWeights] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)  # replace the base's, e.g. resized ones
    saved: dict[str, Tensor] = field(default_factory=dict)  # trained whole, of `modules_to_save`
    tokens: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # ids and their rows

    def tables(self) -> set[str]:
        """Return which of embedding and head it changes by more than a LoRA of the head."""
        names = {name.removesuffix(".weight") for name in (*self.base, *self.saved)}
        names |= self.tokens.keys() | ({EMBEDDING} & self.layers.keys())
        return names & {EMBEDDING, HEAD}

    def drop_copies(self, weights: Mapping[str, Tensor]) -> None:
        """Forget what only repeats a weight of the base, as PEFT stores for some layers."""
        for name, tensor in list(self.base.items()):
            weight = weights.get(name, weights.get(f"{EMBEDDING}.weight"))
            if weight is not None and weight.shape == tensor.shape:
                weight, tensor = weight.cpu(), tensor.cpu()
                # one of them may be rounded
                same = torch.equal(weight.to(tensor.dtype), tensor)
                if same or torch.equal(weight, tensor.to(weight.dtype)):
                    del self.base[name]


def read_lora(path: Path, model: LLaMAConfig) -> SavedLoRA:
    """Read a saved LoRA, ours or PEFT's.

    Layers and ranks follow from the tensors, so PEFT's `target_modules` and `rank_pattern` are not
    needed.

    Raises UserError if the folder holds no LoRA, one of another model, or an unsupported kind.
    """
    settings = read_settings(path)
    _check_settings(settings, path / CONFIG_FILE)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LLaMA(model).named_parameters()}
    shapes.setdefault(f"{HEAD}.weight", shapes[f"{EMBEDDING}.weight"])  # of a tied model
    flags = (bool(settings.get(key)) for key in ("use_rslora", "use_dora"))
    sizes = (settings["r"], settings["lora_alpha"], settings.get("lora_dropout") or 0.0)
    lora = SavedLoRA(path, LoRAConfig(*sizes, (), *flags))
    parts = _sort_tensors(lora, settings, shapes.keys())
    vocab_size = model.vocab_size
    for name, tensor in (*lora.base.items(), *lora.saved.items()):
        expected = shapes[name]
        if name in (f"{EMBEDDING}.weight", f"{HEAD}.weight"):
            vocab_size = len(tensor)  # another one, if tokens were added
            expected = (vocab_size, *expected[1:])
        _check_shapes(path, name, [tensor], [expected])
    for layer in sorted(parts):
        a, b, magnitude = (parts[layer].get(kind) for kind in ("A", "B", "magnitude_vector"))
        r = 0 if a is None or not a.dim() else len(a)
        if f"{layer}.weight" not in shapes:
            problem = f"the model has no layer {layer}"
            raise UserError(f"{path}: {problem}. It belongs to another model")
        out_features, in_features = shapes[f"{layer}.weight"]
        tokens = vocab_size
        if layer == EMBEDDING and a is not None:
            out_features, in_features = in_features, (tokens := a.size(-1))
        elif layer == HEAD and b is not None:
            out_features = tokens = len(b)
        expected = [(r, in_features), (out_features, r)]
        expected.append((out_features,) if lora.config.use_dora else None)
        _check_shapes(path, layer, [a, b, magnitude], expected)
        if tokens != vocab_size:
            problem = f"its {layer} has {tokens} tokens, the model {vocab_size}"
            hint = "Save it again with save_embedding_layers=True, so that it holds the new ones"
            raise UserError(f"{path}: {problem}. {hint}")
        scaling = _alpha(settings, layer) / (math.sqrt(r) if lora.config.use_rslora else r)
        lora.layers[layer] = LoRAWeights(a, b, scaling, magnitude)
    lora.config.targets = target_names(lora.layers, shapes)
    return lora


def _sort_tensors(
    lora: SavedLoRA, settings: dict[str, Any], known: Iterable[str]
) -> dict[str, dict[str, Tensor]]:
    """Read the weights. Returns a LoRA's tensors by layer and kind, the others go into `lora`."""
    modules = settings.get("modules_to_save") or []
    indices = settings.get("trainable_token_indices") or []
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_weights(lora.path)[0].items():
        name = WRAPPERS.sub("", key).removeprefix(PREFIX).removeprefix("model.")
        if tensor.numel() == 0:
            problem = f"{key} is empty, as DeepSpeed leaves it if it saves without gathering"
            raise UserError(f"{lora.path}: {problem}. Save it again")
        plain, is_base = BASE_TENSOR.subn("", name)
        plain, is_saved = SAVED_TENSOR.subn("", plain)
        if match := LORA_TENSOR.fullmatch(name):
            layer = parts.setdefault(match["layer"], {})
            if layer.setdefault(match["kind"], tensor) is not tensor:
                raise UserError(f"{lora.path}: holds several LoRAs: {key}. Save one of them alone")
        elif match := TOKENS_TENSOR.fullmatch(name):
            ids = indices
            if isinstance(indices, dict):  # by the end of a layer's name
                ids = next((v for k, v in indices.items() if is_end(k, match["layer"])), [])
            if len(ids) != len(tensor):
                problem = f"{key} has {len(tensor)} rows for {len(ids)} trainable_token_indices"
                raise UserError(f"{lora.path}: {problem}. Write it again")
            lora.tokens[match["layer"]] = (torch.tensor(ids), tensor)
        elif plain not in known:
            problem = f"{key} is neither a LoRA's nor a weight of the model"
            raise UserError(f"{lora.path}: {problem}, so it is not supported")
        elif not tensor.is_floating_point():
            problem = f"{key} is {tensor.dtype}; quantized weights are not supported"
            raise UserError(f"{lora.path}: {problem}")
        elif is_saved or (
            not is_base and any(is_end(k, plain.rpartition(".")[0]) for k in modules)
        ):
            lora.saved[plain] = tensor
        else:
            lora.base[plain] = tensor
    layers, saved = ({name.rpartition(".")[0] for name in names} for names in (known, lora.saved))
    for module in modules:
        # PEFT ignores names that the model does not have
        if any(is_end(module, x) for x in layers) and not any(is_end(module, x) for x in saved):
            problem = f"{module} of modules_to_save is missing in its weights"
            raise UserError(f"{lora.path}: {problem}. Write it again")
    if not (parts or lora.saved or lora.tokens):
        raise UserError(f"{lora.path}: holds no LoRA")
    return parts


def is_end(end: str, layer: str) -> bool:
    """Check whether a name of PEFT's settings is that of a layer, or its last parts."""
    return f".{_full_name(layer)}".endswith(f".{end}")


def _full_name(layer: str) -> str:
    return transformers_name(f"{layer}.weight").removesuffix(".weight")


def _check_shapes(
    path: Path, name: str, tensors: list[Tensor | None], expected: list[tuple[int, ...] | None]
) -> None:
    found = [None if tensor is None else tuple(tensor.shape) for tensor in tensors]
    if found != expected:
        problem = f"{name} has shapes {found}, the model's layer needs {expected}"
        hint = "It belongs to another model, or was saved in part (FSDP, DeepSpeed)"
        if len(found) == 3 and (found[2] is None) != (expected[2] is None):
            hint = "Is use_dora in adapter_config.json right?"
        raise UserError(f"{path}: {problem}. {hint}")


def _alpha(settings: dict[str, Any], layer: str) -> float:
    """Return the alpha of a layer. A key of PEFT's pattern is its end, or a regular expression."""
    alphas, layer = settings.get("alpha_pattern") or {}, _full_name(layer)
    matches = (alpha for key, alpha in alphas.items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(matches, settings["lora_alpha"])


def target_names(layers: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Return the last parts of the layers' names where these mean no other layer, else the names.

    `known` are the names of the model's parameters.
    """
    layers = list(layers)
    all_layers = [name.removesuffix(".weight") for name in known if name.endswith(".weight")]
    targets = {}
    for layer in layers:
        end = layer.rpartition(".")[2]
        everywhere = all(name in layers for name in all_layers if name.rpartition(".")[2] == end)
        targets[end if everywhere else layer] = None
    return tuple(targets)


def weights_file(path: Path) -> Path:
    """Return the file with the weights of a LoRA or adapter. safetensors come before .bin."""
    pickled = path / PICKLED_FILE
    use_pickled = pickled.exists() and not (path / WEIGHTS_FILE).exists()
    return pickled if use_pickled else path / WEIGHTS_FILE


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the weights of a LoRA or adapter, and their metadata."""
    file = weights_file(path)
    if file.suffix != ".bin":
        return files.read_tensors(file)
    tensors = files.load_pickled(file)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{file}: not a table of tensors by name. Write it again")
    return tensors, {}


def _check_settings(settings: dict[str, Any], file: Path) -> None:
    kind = settings.get("peft_type") or settings.get("method")
    if kind != "LORA" or not {"r", "lora_alpha"} <= settings.keys():
        raise UserError(f"{file}: peft_type is {kind!r}, not a LORA with r and lora_alpha")
    alphas = settings["lora_alpha"], *(settings.get("alpha_pattern") or {}).values()
    if not all(isinstance(value, int | float) for value in (settings["r"], *alphas)):
        raise UserError(f"{file}: r is {settings['r']!r}, alpha {alphas}, expected numbers")
    for key in UNSUPPORTED:
        if settings.get(key):
            raise UserError(f"{file}: {key} is {settings[key]!r}, which is not supported")
    if (task := settings.get("task_type")) not in (None, "CAUSAL_LM"):
        raise UserError(f"{file}: task_type is {task!r}, which is not supported")
    start = settings.get("init_lora_weights")
    if str(start).startswith(UNSUPPORTED_STARTS):
        raise UserError(f"{file}: init_lora_weights is {start!r}, which is not supported")
