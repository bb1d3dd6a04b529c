"""Checkpoint folders as Hugging Face writes them: `config.json`, safetensors (or `.bin`) weights, tokenizer files."""

import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_llama.config import LLaMAConfig, read_json
from lit_llama.errors import UserError
from lit_llama.model import LLaMA

TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)
MAX_SHARD_BYTES = 5 * 10**9


def load_model(
    checkpoint_dir: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> LLaMA:
    """A LLaMA with the weights of a Hugging Face model folder, rounded to `dtype`, on `device`, frozen, in eval mode.

    Each tensor goes from the memory-mapped file into place; on the CPU, mapped pages that hold `dtype` already are the
    weights themselves. Raises UserError where config or weights are missing, damaged or do not belong together.
    """
    config = LLaMAConfig.from_checkpoint(checkpoint_dir)
    with torch.device("meta"):
        model = LLaMA(config)
    source = WeightFiles(Path(checkpoint_dir))
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    surplus = source.places.keys() - wanted.keys() - {"lm_head.weight"}  # some tied checkpoints store the head too
    if surplus:
        raise UserError(f"{checkpoint_dir}: the weights hold {sorted(surplus)[:3]}, config.json's model does not")
    if missing := wanted.keys() - source.places.keys():
        raise UserError(f"{checkpoint_dir}: the weights lack {sorted(missing)[:3]}. Download the folder again")
    for name, shape in wanted.items():
        tensor, (module, _, leaf) = source.read(name), name.rpartition(".")
        if tuple(tensor.shape) != shape:
            raise UserError(f"{checkpoint_dir}: {name} has shape {tuple(tensor.shape)}, config.json asks for {shape}")
        if not tensor.is_floating_point():
            raise UserError(f"{checkpoint_dir}: {name} holds {tensor.dtype}; quantized checkpoints are not supported")
        weight = nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)
        setattr(model.get_submodule(module), leaf, weight)
    return model.eval()


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
                if not name.endswith("rotary_emb.inv_freq"):  # of old exports; it follows from the config
                    self.places[name.removeprefix("model.")] = (file, name)

    def read(self, name: str) -> Tensor:
        """The tensor itself, on the CPU, memory-mapped."""
        file, stored_name = self.places[name]
        # opened anew for each tensor: pages of the tensors before are given back once those were copied
        if file.suffix == ".bin":
            return load_pickled(file)[stored_name]
        with open_safetensors(file) as handle:
            return handle.get_tensor(stored_name)


def _weight_files(folder: Path) -> list[Path]:
    """safetensors before `.bin`, and of each kind the index before the single file."""
    for single in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = folder / f"{single.name}.index.json"
        if not index.is_file() and single.is_file():
            return [single]
        if not index.is_file():
            continue
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index}: has no weight_map of names to files. Download this file again")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"{index}: names {name}, which is not in this folder. Download the folder again")
        return [folder / name for name in names]
    hint = "python scripts/download.py --repo_id ... (see howto/download_weights.md)"
    raise UserError(f"{folder}: no model.safetensors and no pytorch_model.bin there. Download the weights: {hint}")


@contextmanager
def open_safetensors(file: Path) -> Iterator[safe_open]:
    """`safe_open` for reading on the CPU. Raises UserError where the file is missing, cut off or malformed."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else f"damaged or cut off ({error})"
        raise UserError(f"{file}: {reason}. Download or write it again") from None


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, memory-mapped, and its metadata. Raises UserError as `open_safetensors`."""
    with open_safetensors(file) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118


def load_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` or `.pth`, memory-mapped. Raises UserError for others."""
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{file}: refused, its pickle holds more than tensors (it could run code)") from None
    except Exception as error:  # torch raises a dozen kinds for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: damaged or cut off ({reason}). Download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{file}: should hold named tensors and nothing else")
    return tensors


def save_checkpoint(
    folder: Path, config: LLaMAConfig, tensors: Iterable[tuple[str, Tensor]], files: dict[str, bytes]
) -> None:
    """Write a model folder that `transformers` and `load_model` read, whole or not at all.

    `tensors` are of one dtype, under our names; a generator of them needs no more memory than one shard of 5 GB.
    `files` are further files by name, such as `tokenizer_files` of another folder.
    """
    check_new_folder(folder)
    with replacing(folder) as temporary:
        temporary.mkdir()
        shard: dict[str, Tensor] = {}
        weight_map: dict[str, str] = {}  # stored name -> file
        number, total = 1, 0
        for name, tensor in tensors:
            if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > MAX_SHARD_BYTES:
                save_tensors(shard, temporary / f"model-{number:05}.safetensors")
                shard, number = {}, number + 1
            stored_name = name if name.startswith("lm_head.") else f"model.{name}"
            shard[stored_name] = tensor.detach().cpu().contiguous()
            weight_map[stored_name] = f"model-{number:05}.safetensors"
            total += tensor.nbytes
        save_tensors(shard, temporary / ("model.safetensors" if number == 1 else weight_map[stored_name]))
        if number > 1:
            index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            (temporary / "model.safetensors.index.json").write_text(index, "utf-8")
        config.save(temporary, dtype=tensor.dtype)
        for name, content in files.items():
            (temporary / name).write_bytes(content)


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """A folder's tokenizer files by name."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def save_tensors(tensors: dict[str, Tensor], file: Path, **metadata: str) -> None:
    """`save_file` of safetensors, with a full disk as an OSError instead of the library's own exception."""
    try:
        save_file(tensors, file, {"format": "pt"} | metadata)
    except SafetensorError as error:
        raise OSError(None, f"cannot be written ({error})", str(file)) from None
    file.chmod(file.parent.stat().st_mode & 0o666)  # the library lets nobody but the owner read it


def check_new_folder(folder: Path) -> None:
    """Raise UserError unless `folder` is absent or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already. Give another folder, or move that one away")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path for a file or folder that takes the place of `path`, whole, once the block has ended.

    It is flushed before, and removed if the block ends in an error: readers see the old one or the new one.
    """
    (path := path.resolve()).parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    try:
        yield temporary
        for part in (*temporary.rglob("*"), temporary):
            _fsync(part)
        if path.is_dir():  # a file is replaced by the rename itself
            path.rename(old)
        temporary.rename(path)
        _fsync(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (temporary, old):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
