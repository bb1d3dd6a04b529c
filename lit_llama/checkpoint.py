"""Checkpoint folders as Hugging Face writes them: `config.json`, safetensors (or `.bin`) weights, tokenizer files."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_llama.config import LLaMAConfig, read_json
from lit_llama.distributed import place_like
from lit_llama.errors import UserError
from lit_llama.files import (
    check_new_folder,
    cut_into_files,
    header_template,
    load_pickled,
    open_safetensors,
    replacing,
    save_tensors,
)
from lit_llama.methods import base_parameters, replace_module
from lit_llama.model import LLaMA
from lit_llama.quantize import FOR_TRAINING, QuantizedLinear, quantization

TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def load_model(
    checkpoint_dir: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> LLaMA:
    """A LLaMA with the weights of a Hugging Face model folder, rounded to `dtype`, on `device`, frozen, in eval mode.

    Raises UserError as `load_weights` does.
    """
    model = empty_model(checkpoint_dir, dtype)
    load_weights(model, checkpoint_dir, device)
    return model.eval()


def empty_model(checkpoint_dir: str | Path, dtype: torch.dtype) -> LLaMA:
    """The LLaMA of a model folder's `config.json`, frozen, on the meta device: no memory is used yet."""
    config = LLaMAConfig.from_checkpoint(checkpoint_dir)
    with torch.device("meta"):
        return LLaMA(config).to(dtype).requires_grad_(False)


def load_weights(
    model: LLaMA, checkpoint_dir: str | Path, device: str | torch.device = "cpu", quantize: str | None = None
) -> None:
    """Give the LLaMA's own parameters, which may be wrapped and sharded by now, the values of a model folder.

    Each tensor goes from the memory-mapped file into place, rounded to the dtype of its parameter: a process never
    holds more than its shard of the model and one tensor. On the CPU, mapped pages that hold a frozen parameter's dtype
    already are the weights themselves. With `quantize` (nf4, fp8) each frozen linear layer but the head becomes a
    `QuantizedLinear` as soon as its weight is there. A module whose start depends on its base's weights has
    `init_from_base`, called afterwards. Raises UserError where config or weights are missing, damaged or do not belong
    together.
    """
    source = WeightFiles(Path(checkpoint_dir))
    places = base_parameters(model)
    surplus = source.places.keys() - places.keys() - {"lm_head.weight"}  # some tied checkpoints store the head too
    if surplus:
        raise UserError(f"{checkpoint_dir}: the weights hold {sorted(surplus)[:3]}, config.json's model does not")
    if missing := places.keys() - source.places.keys():
        raise UserError(f"{checkpoint_dir}: the weights lack {sorted(missing)[:3]}. Download the folder again")
    kind = None if quantize is None else quantization(quantize, FOR_TRAINING)
    quantized: dict[nn.Module, QuantizedLinear] = {}
    for name, (module, leaf) in places.items():
        tensor, parameter = source.read(name), getattr(module, leaf)
        shapes = tuple(tensor.shape), tuple(parameter.shape)
        if shapes[0] != shapes[1]:
            raise UserError(f"{checkpoint_dir}: {name} has shape {shapes[0]}, config.json asks for {shapes[1]}")
        if tensor.dtype not in FLOATS:
            raise UserError(f"{checkpoint_dir}: {name} holds {tensor.dtype}; quantized checkpoints are not supported")
        weight = place_like(parameter, tensor, device)
        if kind and isinstance(module, nn.Linear) and module is not model.lm_head and not parameter.requires_grad:
            if leaf == "weight":
                quantized[module] = kind(weight)
                continue
            module = quantized[module]
        setattr(module, leaf, nn.Parameter(weight, requires_grad=parameter.requires_grad))
    if kind and not quantized:
        raise UserError(f"--quantize {quantize}: all linear layers train here; it is for frozen ones")
    for name, module in list(model.named_modules()):
        if module in quantized:
            replace_module(model, name, quantized[module])
    for module in model.modules():
        if hasattr(module, "init_from_base"):
            module.init_from_base()


class WeightFiles:
    """The tensors of a folder, read one at a time. `places`: our name (without `model.`) -> file and name in it."""

    def __init__(self, folder: Path) -> None:
        self.places: dict[str, tuple[Path, str]] = {}
        for file in _weight_files(folder):
            if file.suffix == ".bin":
                names = load_pickled(file)
            else:
                with open_safetensors(file) as handle:
                    names = handle.keys()
            for name in names:
                own = name.removeprefix("model.")
                if own in self.places:
                    other, its_name = self.places[own]
                    raise UserError(
                        f"{file}: has {name}, but {its_name} is in {other.name} already. Download the folder again"
                    )
                if not name.endswith("rotary_emb.inv_freq"):  # of old exports; it follows from the config
                    self.places[own] = (file, name)

    def read(self, name: str) -> Tensor:
        """The tensor itself, on the CPU, memory-mapped."""
        file, stored_name = self.places[name]
        # opened anew for each tensor: pages of the tensors before are given back once those were copied
        if file.suffix == ".bin":
            return load_pickled(file)[stored_name]
        with open_safetensors(file) as handle:
            return handle.get_tensor(stored_name)


def _weight_files(folder: Path) -> list[Path]:
    """safetensors before `.bin`, and of each kind the single file before the index, as `transformers` does."""
    for single in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = folder / f"{single.name}.index.json"
        if single.exists():
            return [single]
        if not index.exists():
            continue
        weight_map = read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{index}: has no weight_map of names to files. Download this file again")
        for name in sorted(set(names) - {file.name for file in folder.iterdir() if file.is_file()}):
            raise UserError(f"{index}: names {name}, which is not in this folder. Download the folder again")
        if wrong := {Path(name).suffix for name in names} - {single.suffix}:
            raise UserError(f"{index}: names files that are {min(wrong) or 'something'}, not {single.suffix}")
        return [folder / name for name in sorted(set(names))]
    hint = "python scripts/download.py --repo_id ... (see howto/download_weights.md)"
    raise UserError(f"{folder}: no model.safetensors and no pytorch_model.bin there. Download the weights: {hint}")


def check_shapes(found: Mapping[str, tuple[int, ...]], config: LLaMAConfig, source: Path) -> None:
    """Raise UserError where `source` has a tensor, under our name, of another shape than the model of `config`."""
    with torch.device("meta"):
        wanted = {name: tuple(parameter.shape) for name, parameter in LLaMA(config).named_parameters()}
    for name, shape in found.items():
        if tuple(shape) != wanted.get(name):
            raise UserError(f"{source}: {name} would have shape {tuple(shape)}, its sizes ask for {wanted.get(name)}")


def save_checkpoint(
    folder: Path,
    config: LLaMAConfig,
    tensors: Iterable[tuple[str, Tensor]],
    files: Mapping[str, bytes],
    template: str = "",
) -> None:
    """Write a new model folder, as `write_checkpoint` does, whole or not at all. Raises UserError where one exists."""
    check_new_folder(folder)
    with replacing(folder) as temporary:
        write_checkpoint(temporary, config, tensors, files, template)


def write_checkpoint(
    folder: Path,
    config: LLaMAConfig,
    tensors: Iterable[tuple[str, Tensor]],
    files: Mapping[str, bytes],
    template: str = "",
) -> None:
    """Write what makes `folder` a model folder for `transformers` and `load_model`, beside what else is in it.

    `tensors` are of one dtype, under our names; a generator of them needs no more memory than one file of 5 GB.
    `files` are further files by name, such as `tokenizer_files` of another folder; `template`, that of the training,
    goes into the header of the weights. `config.json` comes last: a folder without it is no model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in ("config.json", "model.safetensors.index.json"):
        (folder / stale).unlink(missing_ok=True)
    weight_map: dict[str, str] = {}  # stored name -> file
    total, written = 0, []
    for number, group in enumerate(cut_into_files(tensors), start=1):
        stored = {
            name if name.startswith("lm_head.") else f"model.{name}": tensor.detach().cpu().contiguous()
            for name, tensor in group.items()
        }
        dtype = next(iter(group.values())).dtype
        total += sum(tensor.nbytes for tensor in group.values())
        written.append(f"model-{number:05}.safetensors")
        weight_map |= dict.fromkeys(stored, written[-1])
        with replacing(folder / written[-1]) as file:
            save_tensors(stored, file, **({"template": template} if template else {}))
        del group, stored  # before the next one is gathered
    for stale in folder.glob("model*.safetensors"):  # of a result that this one takes the place of
        if stale.name not in written:
            stale.unlink()
    if len(written) == 1:
        (folder / written[0]).rename(folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files = {"model.safetensors.index.json": json.dumps(index, indent=2).encode()} | dict(files)
    for name, content in files.items():
        with replacing(folder / name) as file:
            file.write_bytes(content)
    config.save(folder, dtype)


def checkpoint_template(folder: Path) -> str | None:
    """The prompt template that a model folder of ours was finetuned with, None where it does not say."""
    file = _weight_files(folder)[0]
    return None if file.suffix == ".bin" else header_template(file)


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """A folder's tokenizer files by name."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
