"""Checkpoint folders as Hugging Face writes them: `config.json`, safetensors (or `.bin`) weights, tokenizer files."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
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

    Each tensor goes from the memory-mapped file into place. Where the file already holds `dtype` and the device is
    the CPU, the mapped pages themselves are the weights. Raises UserError where the folder, its config or its weights
    are missing, damaged or do not belong together.
    """
    config = LLaMAConfig.from_checkpoint(checkpoint_dir)
    with torch.device("meta"):
        model = LLaMA(config)
    source = WeightFiles(Path(checkpoint_dir))
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    surplus = source.places.keys() - wanted.keys() - {"lm_head.weight"}  # some tied checkpoints store the head too
    if surplus:
        raise UserError(f"{checkpoint_dir}: {_some(surplus)} in the weights but not in config.json's model")
    missing = wanted.keys() - source.places.keys()
    if missing:
        raise UserError(f"{checkpoint_dir}: the weights lack {_some(missing)}. Download the folder again")
    for name, shape in wanted.items():
        tensor = source.read(name)
        if tuple(tensor.shape) != shape:
            raise UserError(f"{checkpoint_dir}: {name} has shape {tuple(tensor.shape)}, config.json asks for {shape}")
        if not tensor.is_floating_point():
            raise UserError(f"{checkpoint_dir}: {name} holds {tensor.dtype}; quantized checkpoints are not supported")
        module, _, leaf = name.rpartition(".")
        weight = nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)
        setattr(model.get_submodule(module), leaf, weight)
    return model.eval()


class WeightFiles:
    """The tensors of a folder, read one at a time. `places`: our name (without `model.`) -> file and name in it."""

    def __init__(self, folder: Path) -> None:
        self.places: dict[str, tuple[Path, str]] = {}
        self.bins: dict[Path, dict[str, Tensor]] = {}
        for file in _weight_files(folder):
            if file.suffix == ".bin":
                names = self.bins[file] = load_pickled(file)
            else:
                with open_safetensors(file) as handle:
                    names = handle.keys()
            # old exports hold inv_freq, which follows from the config
            kept = [name for name in names if not name.endswith("rotary_emb.inv_freq")]
            self.places |= {name.removeprefix("model."): (file, name) for name in kept}

    def read(self, name: str) -> Tensor:
        """The tensor itself, on the CPU, memory-mapped."""
        file, stored_name = self.places[name]
        if file in self.bins:
            return self.bins[file][stored_name]
        # opened anew for each tensor: pages of the tensors before are given back once those were copied
        with open_safetensors(file) as handle:
            return handle.get_tensor(stored_name)


def _weight_files(folder: Path) -> list[Path]:
    """safetensors before `.bin`, and of each kind the index before the single file."""
    for single in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = folder / f"{single.name}.index.json"
        if not index.is_file():
            if single.is_file():
                return [single]
            continue
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index}: has no weight_map of names to files. Download this file again")
        for name in sorted(set(weight_map.values())):
            if Path(name).name != name:
                raise UserError(f"{index}: names {name}, which is outside this folder")
            if not (folder / name).is_file():
                raise UserError(f"{folder / name}: missing, though {index.name} names it. Download the folder again")
        return [folder / name for name in sorted(set(weight_map.values()))]
    raise UserError(
        f"{folder}: no model.safetensors and no pytorch_model.bin there. Download the weights: "
        "python scripts/download.py --repo_id ... (see howto/download_weights.md)"
    )


@contextmanager
def open_safetensors(file: Path) -> Iterator[safe_open]:
    """`safe_open` for reading on the CPU. Raises UserError where the file is missing, cut off or malformed."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else f"damaged or cut off ({error})"
        raise UserError(f"{file}: {reason}. Download or write it again") from None


def load_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin`, `.pth` or `.pt`, memory-mapped (but for the format of before torch 1.6).

    Raises UserError where the file is damaged, or its pickle asks for code to be run (none is).
    """
    try:
        tensors = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
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
    """Write a model folder that `transformers` and `load_model` read; whole or not at all, as in `new_folder`.

    Args:
        tensors: our names and tensors of one dtype, on any device; taken one at a time and saved in shards of at most
            5 GB, so that a generator needs no more memory than a shard.
        files: further files by name, such as `tokenizer_files` of another folder.
    """
    with new_folder(folder) as temporary:
        shards: list[dict[str, Tensor]] = [{}]
        total, weight_map = 0, {}

        def part(number: int) -> Path:
            return temporary / f"part-{number}"

        for name, tensor in tensors:
            if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > MAX_SHARD_BYTES:
                save_tensors(shards[-1], part(len(shards)))
                shards[-1] = dict.fromkeys(shards[-1])  # the names are still needed, the tensors are not
                shards.append({})
            stored_name = name if name.startswith("lm_head.") else f"model.{name}"
            shards[-1][stored_name] = tensor.detach().cpu().contiguous()
            total += tensor.nbytes
        save_tensors(shards[-1], part(len(shards)))
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            part(number).rename(temporary / file)
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")
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


@contextmanager
def new_folder(folder: str | Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder`, whole, when the block ends without an error, and vanishes otherwise.

    Everything in it is flushed to disk before the rename, so a crash leaves either all of it or nothing. Raises
    UserError where `folder` holds something already, unless `replace` says to put this in its place.
    """
    folder = Path(folder)
    if not replace:
        check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (folder.with_name(f".{folder.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        flush(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        flush(folder.parent, recurse=False)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_new_folder(folder: Path) -> None:
    """Raise UserError unless `folder` is absent or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already. Give another folder, or move that one away")


def write_file(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, flush it and rename it to `file`: readers see the old one or the new one."""
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        write(temporary)
        flush(temporary)
        temporary.replace(file)
        flush(file.parent, recurse=False)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path, recurse: bool = True) -> None:
    """fsync a file or a folder, and with `recurse` everything in it, so that a rename comes after its contents."""
    for part in [*(path.rglob("*") if recurse else ()), path]:
        if part.is_file():
            part.chmod(0o666 & ~_UMASK)  # safetensors makes its files unreadable for anybody else
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_UMASK = os.umask(0o022)
os.umask(_UMASK)


def _some(names: Iterable[str]) -> str:
    """Up to three of the names, for a message."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
