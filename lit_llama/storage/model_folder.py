"""Model folders of Hugging Face: config.json, weights (safetensors or .bin), tokenizer files."""

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lit_llama.config import LLaMAConfig, read_json
from lit_llama.errors import UserError
from lit_llama.model import LLaMA
from lit_llama.storage import files
from lit_llama.storage.shards import shard_like
from lit_llama.wrapping import base_parameters

EMBEDDING, HEAD = "embed_tokens", "lm_head"  # one parameter if the head is tied
UNTRAINED = 1e-6  # largest difference between the values of a row that was never trained
QUANTIZED = "quantized folders do not load. Download the unquantized model"
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "generation_config.json"),
)


def load_model(
    checkpoint_dir: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> LLaMA:
    """Load a model in eval mode with frozen weights, rounded to `dtype`, from a model folder."""
    model = empty_model(checkpoint_dir, dtype)
    load_weights(model, checkpoint_dir, device)
    return model.eval()


def without_random_numbers() -> AbstractContextManager:
    """Leave new embeddings as they are. Random numbers on meta import torch._dynamo, in 0.5 s."""
    return patch.object(nn.Embedding, "reset_parameters")


def empty_model(checkpoint_dir: str | Path, dtype: torch.dtype) -> LLaMA:
    """Create the frozen model of a folder on the meta device (shapes only)."""
    config = model_config(checkpoint_dir)
    with torch.device("meta"), without_random_numbers():
        return LLaMA(config).to(dtype).requires_grad_(False)


def model_config(checkpoint_dir: str | Path) -> LLaMAConfig:
    """Load `config.json`; the head is untied if the weights have one that is not the embedding."""
    config = LLaMAConfig.from_checkpoint(checkpoint_dir)
    heads = _stored_heads(Path(checkpoint_dir)) if config.tie_word_embeddings else {}
    if len(heads) == 2:
        embedding, head = (read_tensor(*place) for place in heads.values())
        same = embedding.shape == head.shape and torch.equal(embedding, head.to(embedding))
        config.tie_word_embeddings = same
    return config


def load_weights(
    model: LLaMA,
    checkpoint_dir: str | Path,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    packed: bool = False,
) -> None:
    """Load a folder's weights into a model, which may be wrapped by methods and sharded.

    A process holds at most its shard of the model and one more tensor. On the CPU, frozen weights
    that are stored in the parameter's dtype stay memory-mapped.

    Args:
        quantize: Replace the frozen linear layers, except the head, by nf4 or fp8 ones.
        packed: Else replace them by packed ones (CPU).
    """
    folder = Path(checkpoint_dir)
    stored = stored_names(folder)
    with without_random_numbers():  # of a second model, for its names
        parameters = base_parameters(model)
    if model.config.tie_word_embeddings and "lm_head.weight" in stored:
        # some folders store a tied head twice, or under this name only
        stored.setdefault("embed_tokens.weight", stored.pop("lm_head.weight"))
    _require_same_names(folder, stored, parameters)
    make = None  # what makes the form of a frozen linear layer
    if quantize:
        from lit_llama.fast.quantization import FOR_TRAINING, quantization

        make = quantization(quantize, FOR_TRAINING)
    elif packed:
        from lit_llama.fast.packing import FrozenPackedLinear as make
    replaced: dict[nn.Module, nn.Module] = {}  # linear layer -> its new form
    for name, (module, attribute) in parameters.items():
        parameter, tensor = getattr(module, attribute), read_tensor(*stored[name])
        if _is_quantized(tensor):
            raise UserError(f"{folder}: {name} is {tensor.dtype}; {QUANTIZED}")
        if tensor.shape != parameter.shape:
            problem = f"{name} has shape {tuple(tensor.shape)}"
            raise UserError(f"{folder}: {problem}, config.json requires {tuple(parameter.shape)}")
        weight = shard_like(parameter, tensor, device)
        is_linear = isinstance(module, nn.Linear) and module is not model.lm_head
        if make and is_linear and not parameter.requires_grad:
            # the weight comes before the bias, so the full layer exists only until it is quantized
            if attribute == "weight":
                replaced[module] = make(weight)
                continue
            module = replaced[module]
        setattr(module, attribute, nn.Parameter(weight, parameter.requires_grad))
    if quantize and not replaced:
        raise UserError(f"--quantize {quantize}: works for frozen layers, but all of them train")
    for name, module in list(model.named_modules()):
        if module in replaced:
            model.set_submodule(name, replaced[module])
    for module in model.modules():
        if hasattr(module, "init_from_base"):  # such as DoRA's magnitude
            module.init_from_base()


def _require_same_names(
    folder: Path, stored: Mapping[str, tuple[Path, str]], parameters: Mapping[str, object]
) -> None:
    unmatched = sorted(stored.keys() ^ parameters.keys())
    if not unmatched:
        return
    if any(_is_quantized(read_tensor(*place)) for place in stored.values()):
        raise UserError(f"{folder}: {unmatched[0]}: {QUANTIZED}")
    problem = f"weights and config.json do not match in {unmatched[:3]}"
    hint = "Download the folder again"
    if unmatched == ["lm_head.weight"]:
        hint = "Download it again, or set tie_word_embeddings to true if its head is tied"
    raise UserError(f"{folder}: {problem}. {hint}")


def _is_quantized(tensor: Tensor) -> bool:
    return tensor.dtype.itemsize < 2 or not tensor.dtype.is_floating_point


def untrained_tokens(checkpoint_dir: str | Path, token_ids: Iterable[int]) -> list[int]:
    """Return those of some special tokens whose row in the embedding or head was never trained.

    All values of such a row are equal, or it is identical to that of another of the tokens.
    Returns [] if the folder has no weights.
    """
    untrained, ids = set(), set(token_ids)
    for place in _stored_heads(Path(checkpoint_dir)).values():
        weight = read_tensor(*place)  # memory-mapped: only these rows are read
        rows = {index: weight[index] for index in ids if 0 <= index < len(weight)}
        for index, row in rows.items():
            others = (other for key, other in rows.items() if key != index)
            constant = row.max() - row.min() <= UNTRAINED
            if constant or any(torch.equal(row, other) for other in others):
                untrained.add(index)
    return sorted(untrained)


def _stored_heads(folder: Path) -> dict[str, tuple[Path, str]]:
    """Select embedding and head of `stored_names`, {} without weights: loading raises for that."""
    try:
        stored = stored_names(folder)
    except UserError:
        return {}
    names = (f"{EMBEDDING}.weight", f"{HEAD}.weight")
    return {name: stored[name] for name in names if name in stored}


def stored_names(folder: Path) -> dict[str, tuple[Path, str]]:
    """Map our names of a model folder's weights to their files and their names there."""
    stored = {}
    for file in weight_files(folder):
        is_pickle = file.suffix == ".bin"
        names = files.load_pickled(file) if is_pickle else files.read_tensors(file)[0]
        stored |= {name.removeprefix("model."): (file, name) for name in names}
    # old exports store RoPE's frequencies, which follow from config.json
    return {name: place for name, place in stored.items() if "rotary_emb" not in name}


def read_tensor(file: Path, stored_name: str) -> Tensor:
    # opened for each tensor, so that the pages of the tensors before are freed
    if file.suffix == ".bin":
        return files.load_pickled(file)[stored_name]
    with files.open_safetensors(file) as handle:
        return handle.get_tensor(stored_name)


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of a folder's weights, that of the first one."""
    return read_tensor(*next(iter(stored_names(folder).values()))).dtype


def weight_files(folder: Path) -> list[Path]:
    """List the weight files. safetensors come before .bin, as in `transformers`."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name]
        if index.exists():
            # names only: an index may not lead out of its folder
            names = {Path(name).name for name in read_json(index).get("weight_map", {}).values()}
            return [folder / name for name in sorted(names)]
    problem = f"{folder}: no model.safetensors and no pytorch_model.bin there"
    hint = "python scripts/download.py --repo_id ... (see howto/download_weights.md)"
    raise UserError(f"{problem}. Download the weights: {hint}")


def transformers_name(name: str) -> str:
    """Return the name of a parameter in `transformers`, where all but the head is in `model`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def save_model_folder(
    folder: Path,
    config: LLaMAConfig,
    tensors: Iterable[tuple[str, Tensor]],
    extra_files: Mapping[str, bytes],
    template: str = "",
) -> None:
    """Write a new model folder atomically; see `write_model_folder`."""
    files.require_empty_dir(folder)
    with files.atomic_write(folder) as temporary:
        write_model_folder(temporary, config, tensors, extra_files, template)


def write_model_folder(
    folder: Path,
    config: LLaMAConfig,
    tensors: Iterable[tuple[str, Tensor]],
    extra_files: Mapping[str, bytes],
    template: str = "",
) -> None:
    """Write a model into a folder that may exist, for `transformers` and `load_model`.

    Args:
        tensors: Weights of one dtype, under our names. At most 5 GB of a generator are in memory.
        extra_files: By name, such as `tokenizer_files` of another folder.
        template: Prompt template of the training, for the metadata of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in ("config.json", "model.safetensors.index.json"):
        (folder / stale).unlink(missing_ok=True)
    weight_map: dict[str, str] = {}  # stored name -> file
    total_size = 0
    for number, group in enumerate(files.split_into_files(tensors), start=1):
        name = f"model-{number:05}.safetensors"
        stored = {
            transformers_name(key): tensor.detach().cpu().contiguous()
            for key, tensor in group.items()
        }
        total_size += sum(tensor.nbytes for tensor in stored.values())
        dtype = next(iter(stored.values())).dtype
        weight_map |= dict.fromkeys(stored, name)
        with files.atomic_write(folder / name) as file:
            files.save_tensors(stored, file, **({"template": template} if template else {}))
        del group, stored  # before the next group is gathered
    for old in folder.glob("model*.safetensors"):  # of an earlier result
        if old.name not in weight_map.values():
            old.unlink()
    contents = dict(extra_files)
    if number == 1:
        (folder / name).rename(folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        contents["model.safetensors.index.json"] = json.dumps(index, indent=2).encode()
    # last: without it the folder is not a model
    contents["config.json"] = config.to_json(dtype).encode()
    for name, content in contents.items():
        with files.atomic_write(folder / name) as file:
            file.write_bytes(content)


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Read the tokenizer files of a folder, by name."""
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return {name: (folder / name).read_bytes() for name in names}
