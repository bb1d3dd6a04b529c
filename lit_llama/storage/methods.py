"""The table of finetuning methods, and loading of whatever a finetuning run has saved."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_llama.adapter import apply_adapter, apply_adapter_v2
from lit_llama.args import AdapterConfig, LoRAConfig
from lit_llama.config import LLaMAConfig, read_json
from lit_llama.errors import UserError
from lit_llama.lora import LoRALinear, apply_lora, merge_lora
from lit_llama.model import LLaMA
from lit_llama.storage import files, loras, model_folder, peft
from lit_llama.storage.tokenizer_files import has_tokenizer, read_chat_template, read_named_tokens
from lit_llama.tokenizer import Tokenizer
from lit_llama.wrapping import base_name, unfreeze

GENERATION_CONFIG = "generation_config.json"
Tensors = Iterable[tuple[str, Tensor]]  # trained parameters by name, full and on the CPU


@dataclass(frozen=True)
class SaveInfo:
    """Metadata to save with the weights of a result."""

    model: LLaMA
    base_model: str
    template: str


@dataclass(frozen=True)
class Method:
    """A finetuning method."""

    script: str  # its script in finetune/, which is its name for other scripts, too
    config: type  # dataclass of its settings
    apply: Callable[[LLaMA, Any], None]  # changes a model: what requires gradients then is trained
    save: Callable[[Path, Tensors, Any, SaveInfo], None]  # writes a result into a folder
    load: Callable[[LLaMA, Path], Any] | None = None  # applies a result; None for full models
    merge: Callable[[LLaMA], None] | None = None  # merges into the base what `load` has applied
    # factor on the learning rate, by the settings and a parameter's name
    learning_rate_ratio: Callable[[Any, str], float] = lambda config, name: 1.0


def plain_method(
    name: str, script: str, config: type, apply: Callable, endings: tuple[str, ...]
) -> Method:
    """Make a method that saves the parameters whose names have these endings, as they are."""

    def save(folder: Path, tensors: Tensors, settings: Any, info: SaveInfo) -> None:
        named = {base_name(key): tensor for key, tensor in tensors}
        own = {key: tensor for key, tensor in named.items() if key.endswith(endings)}
        values = {"method": name, **asdict(settings), "base_model_name_or_path": info.base_model}
        peft.save_adapter_folder(folder, values, own, info.template)

    def load(model: LLaMA, folder: Path) -> None:
        settings = peft.read_settings(folder)
        apply(model, config(**{field.name: settings[field.name] for field in fields(config)}))
        names = {base_name(key): key for key in model.state_dict()}
        names = {key: name for key, name in names.items() if key.endswith(endings)}
        tensors, _ = peft.read_weights(folder)
        if wrong := sorted(names.keys() ^ tensors.keys()):
            problem = f"{wrong[0]} is not in both the file and the model"
            raise UserError(f"{folder}: {problem}. It belongs to another model")
        try:
            model.load_state_dict({names[key]: t for key, t in tensors.items()}, strict=False)
        except RuntimeError as error:  # names the keys and their shapes
            raise UserError(f"{folder}: it belongs to another model ({error})") from None

    return Method(script, config, apply, save, load)


@dataclass
class FullConfig:
    """Settings of full finetuning."""

    precision: str = "bf16-mixed"


def _save_full(folder: Path, tensors: Tensors, config: FullConfig, info: SaveInfo) -> None:
    dtype = torch.float32 if config.precision == "32-true" else torch.bfloat16
    rounded = ((name, tensor.to(dtype)) for name, tensor in tensors)
    tokenizer = model_folder.tokenizer_files(Path(info.base_model))
    model_folder.write_model_folder(folder, info.model.config, rounded, tokenizer, info.template)


def _save_lora(folder: Path, tensors: Tensors, config: LoRAConfig, info: SaveInfo) -> None:
    layers = (pair for pair in info.model.named_modules() if isinstance(pair[1], LoRALinear))
    scalings = {base_name(name): layer.scaling for name, layer in layers}
    peft.save_lora(dict(tensors), folder, config, info.base_model, info.template, scalings)


# By the name in adapter_config.json (`peft_type` or `method`). A new method is one more entry.
METHODS: dict[str, Method] = {
    "LORA": Method(
        script="lora",
        config=LoRAConfig,
        apply=apply_lora,
        save=_save_lora,
        load=loras.load_lora,
        merge=merge_lora,
        # LoRA+ (arXiv 2402.12354, section 4): B learns faster than A.
        learning_rate_ratio=lambda config, name: (
            config.loraplus_lr_ratio if ".lora_B." in name else 1.0
        ),
    ),
    "llama_adapter": plain_method(
        "llama_adapter", "adapter", AdapterConfig, apply_adapter, (".prompt", ".gate")
    ),
    "llama_adapter_v2": plain_method(
        "llama_adapter_v2",
        "adapter_v2",
        AdapterConfig,
        apply_adapter_v2,
        (".prompt", ".gate", ".adapter_scale", ".adapter_bias", "norm.weight"),
    ),
    "full": Method(
        script="full",
        config=FullConfig,
        apply=lambda model, config: unfreeze(model, config.precision),
        save=_save_full,
    ),
}


def save_methods(
    folder: Path, tensors: Tensors, methods: Mapping[str, Any], info: SaveInfo
) -> None:
    """Save the first method's result in `folder`, that of an adapter beside it in a subfolder."""
    if len(methods) > 1:
        tensors = list(tensors)  # all of them are small
    for number, (name, config) in enumerate(methods.items()):
        METHODS[name].save(folder / "adapter" if number else folder, tensors, config, info)


def load_method(model: LLaMA, path: Path) -> None:
    """Apply a saved result of any method to a model, in place, and merge it if possible."""
    settings = peft.read_settings(path)
    name = settings.get("method") or settings.get("peft_type")
    method = METHODS.get(name)
    if method is None or method.load is None:
        known = ", ".join(key for key, other in METHODS.items() if other.load is not None)
        raise UserError(f"{path / peft.CONFIG_FILE}: {name!r} is not supported. Known: {known}")
    method.load(model, path)
    if method.merge is not None:
        method.merge(model)
    if peft.has_adapter(path):  # trained beside it
        load_method(model, path / "adapter")


def load_finetuned(
    path: Path,
    checkpoint_dir: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    template: str | None = None,
) -> tuple[LLaMA, Tokenizer, str]:
    """Load a finetuned model, its tokenizer and the name of its prompt template.

    `path` is the folder of a method's result, ours or PEFT's, or of a model. `checkpoint_dir` is
    the base model; default: the one that the result names. See `prompt_format` for the template.
    """
    base = resolve_model_dir(path, checkpoint_dir)
    form = prompt_format(path, base, template)
    model = model_folder.load_model(base, device, dtype)
    if base != path:
        load_method(model, path)
    model.config = replace(model.config, eos_token_id=form.eos_ids)
    return model, form.tokenizer, form.template


class PromptFormat(NamedTuple):
    """How to prompt a model: its tokenizer, the name of the template, and the end tokens."""

    tokenizer: Tokenizer
    template: str
    eos_ids: int | list[int] | None


def prompt_format(path: Path, base: Path, template: str | None = None) -> PromptFormat:
    """Return the tokenizer, template and end tokens of a result on the model in `base`.

    Those in the result's own folder come before the base's. A template that is not recorded is
    chat if one of the two folders has a chat template, else alpaca; chat or none for a model.
    """
    if path != base:
        peft.read_settings(path)  # raises UserError if nothing is there
    eos = _as_list(LLaMAConfig.from_checkpoint(base).eos_token_id)
    tokenizer = Tokenizer(tokenizer_dir(path, base))
    template = template or training_template(path)
    if path != base:
        own, named = read_chat_template(path), read_named_tokens(path)
        tokenizer.chat_template = own or read_chat_template(base)
        # a folder may name its tokens without a tokenizer of its own
        tokenizer.named |= named
        end = tokenizer.added.get(named.get("eos_token"))
        eos = [tokenizer.eos_id if has_tokenizer(path) else end, *eos]
        if (path / GENERATION_CONFIG).is_file():
            eos = [*_as_list(read_json(path / GENERATION_CONFIG).get("eos_token_id")), *eos]
    if template is None:
        template = "chat" if tokenizer.chat_template else "none" if path == base else "alpaca"
        if path != base and not own:
            problem = "the prompt template of its training is not recorded"
            print(f"{path}: {problem}. Using {template}; see --template", file=sys.stderr)
    eos = list(dict.fromkeys(index for index in eos if index is not None))
    return PromptFormat(tokenizer, template, eos if len(eos) > 1 else next(iter(eos), None))


def tokenizer_dir(path: Path, base: Path) -> Path:
    """Return the folder of a result's tokenizer: its own if it has one, else the base model's."""
    return path if has_tokenizer(path) else base


def prompt_files(path: Path, base: Path, form: PromptFormat) -> dict[str, bytes]:
    """Return the tokenizer files and generation_config.json of a result merged into `base`.

    `form` is the `prompt_format` of the two.
    """
    contents, own = model_folder.tokenizer_files(base), model_folder.tokenizer_files(path)
    generation = own.get(GENERATION_CONFIG, contents.get(GENERATION_CONFIG))
    if has_tokenizer(path):  # files of two tokenizers do not go together
        contents = own
    template = form.tokenizer.chat_template
    if template and template != read_chat_template(tokenizer_dir(path, base)):
        contents["chat_template.jinja"] = template.encode()
    if (named := read_named_tokens(path)) and not has_tokenizer(path):
        options = json.loads(contents.get("tokenizer_config.json", "{}")) | named
        contents["tokenizer_config.json"] = (json.dumps(options, indent=2) + "\n").encode()
    if generation is not None:
        settings = json.loads(generation)
        if not {*_as_list(form.eos_ids)} <= {*_as_list(settings.get("eos_token_id"))}:
            settings["eos_token_id"] = form.eos_ids
            generation = (json.dumps(settings, indent=2) + "\n").encode()
        contents[GENERATION_CONFIG] = generation
    return contents


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def resolve_model_dir(path: Path, checkpoint_dir: Path | None = None) -> Path:
    """Return the model folder of a result: the base model, or `path` itself if it is a model.

    Raises UserError if the base model that the result names is not a folder here.
    """
    if (path / "config.json").is_file() and not (path / peft.CONFIG_FILE).is_file():
        return path
    base = checkpoint_dir or peft.read_settings(path).get("base_model_name_or_path") or ""
    for folder in (Path(base), Path("checkpoints") / base):
        if base and folder.is_dir():
            return folder
    problem = f"its base model {str(base)!r} is not a folder here"
    raise UserError(f"{path}: {problem}. Pass --checkpoint_dir")


def common_model_dir(paths: Iterable[Path], checkpoint_dir: Path | None = None) -> Path:
    """Return the base model of several results. Raises UserError if they name different ones."""
    if checkpoint_dir is not None:
        return checkpoint_dir
    first, *others = {(base := resolve_model_dir(path)).resolve(): base for path in paths}.values()
    if others:
        problem = f"these are for different models ({first}, {others[0]})"
        raise UserError(f"--lora_path: {problem}. To use one for all, pass --checkpoint_dir")
    return first


def training_template(path: Path) -> str | None:
    """Return the prompt template of a result's training, None if it is not recorded (PEFT's)."""
    file = peft.weights_file(path)
    if not file.exists() and (path / "config.json").is_file():  # a full model
        file = model_folder.weight_files(path)[0]
    metadata = {} if file.suffix == ".bin" else files.read_tensors(file)[1]
    return metadata.get("template") or None
