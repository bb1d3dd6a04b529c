"""Checkpoint folders as Hugging Face writes them: `config.json`, safetensors (or `.bin`) weights, tokenizer files."""

import json
import os
import pickle
import shutil
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
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
MAX_SHARD_BYTES = 5 * 10**9


def load_model(
    checkpoint_dir: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> LLaMA:
    """A LLaMA with a checkpoint folder's weights, frozen, in eval mode.

    Each tensor goes from the memory-mapped file into place; nothing is read twice. Where the file already holds
    `dtype` and the device is the CPU, the mapped pages themselves are the weights.

    Args:
        checkpoint_dir: a Hugging Face model folder of the LLaMA family.
        device: where the weights go.
        dtype: what they are rounded to.

    Raises:
        UserError: the folder, its config or its weights are missing, damaged or do not belong together.
    """
    config = LLaMAConfig.from_checkpoint(checkpoint_dir)
    with torch.device("meta"):
        model = LLaMA(config)
    source = WeightFiles(checkpoint_dir)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    surplus = source.names - wanted.keys() - {"lm_head.weight"}  # some tied checkpoints store the head all the same
    if surplus:
        raise UserError(f"{checkpoint_dir}: {_some(surplus)} in the weights but not in config.json's model")
    missing = wanted.keys() - source.names
    if missing:
        raise UserError(f"{checkpoint_dir}: the weights lack {_some(missing)}. Download the folder again")
    for name, shape in wanted.items():
        tensor = source.read(name)
        if tuple(tensor.shape) != shape:
            raise UserError(f"{checkpoint_dir}: {name} has shape {tuple(tensor.shape)}, config.json asks for {shape}")
        if not tensor.is_floating_point():
            raise UserError(f"{checkpoint_dir}: {name} holds {tensor.dtype}; quantized checkpoints are not supported")
        assign_parameter(model, name, tensor.to(device=device, dtype=dtype))
    return model.eval()


def assign_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the frozen parameter `name` ("layers.0.mlp.up_proj.weight") of `model`."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))


class WeightFiles:
    """The tensors of a folder, by our names (Hugging Face's without `model.`), read one at a time."""

    def __init__(self, checkpoint_dir: str | Path) -> None:
        self.folder = Path(checkpoint_dir)
        self.places: dict[str, tuple[Path, str]] = {}  # our name -> file, the name in it
        for index, single in (
            ("model.safetensors.index.json", "model.safetensors"),
            ("pytorch_model.bin.index.json", "pytorch_model.bin"),
        ):
            if (self.folder / index).is_file():
                files = self._files_of_index(self.folder / index)
            elif (self.folder / single).is_file():
                files = [self.folder / single]
            else:
                continue
            self.bins = {file: load_pickled(file) for file in files} if single.endswith(".bin") else {}
            for file in files:
                for name in self._names(file):
                    if not name.endswith("rotary_emb.inv_freq"):  # old exports hold this; it follows from the config
                        self.places[name.removeprefix("model.")] = (file, name)
            break
        else:
            raise UserError(
                f"{self.folder}: no model.safetensors and no pytorch_model.bin there. Download the weights: "
                "python scripts/download.py --repo_id ... (see howto/download_weights.md)"
            )
        self.names = set(self.places)

    def _files_of_index(self, index: Path) -> list[Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index}: has no weight_map of names to files. Download this file again")
        files = [self.folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if file.parent != self.folder:
                raise UserError(f"{index}: names {file.relative_to(self.folder)}, which is outside this folder")
            if not file.is_file():
                raise UserError(f"{file}: missing, though {index.name} names it. Download the folder again")
        return files

    def _names(self, file: Path) -> list[str]:
        if file in self.bins:
            return list(self.bins[file])
        with open_safetensors(file) as handle:
            return list(handle.keys())

    def read(self, name: str) -> Tensor:
        """The tensor itself, on the CPU, memory-mapped where the format allows it."""
        file, stored_name = self.places[name]
        if file in self.bins:
            return self.bins[file][stored_name]
        # opened anew for each tensor: pages of the tensors before are given back once those were copied
        with open_safetensors(file) as handle:
            return handle.get_tensor(stored_name)


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
    """The tensors of a `.bin`, `.pth` or `.ckpt`, memory-mapped where its format allows it.

    Raises:
        UserError: the file is damaged, or its pickle asks for code to be run (none is).
    """
    try:
        try:
            tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            tensors = torch.load(file, map_location="cpu", weights_only=True)  # torch < 1.6 wrote no zip file
    except pickle.UnpicklingError:
        raise UserError(f"{file}: refused, its pickle holds more than tensors (it could run code)") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{file}: damaged or cut off ({str(error).splitlines()[0]}). Download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{file}: should hold named tensors and nothing else")
    return tensors


def save_checkpoint(folder: Path, config: LLaMAConfig, tensors: dict[str, Tensor], tokenizer_dir: Path | None) -> None:
    """Write a model folder that `transformers` and `load_model` read. All or nothing: see `new_folder`.

    Args:
        folder: must not exist yet, or be empty.
        tensors: by our names; saved in their own dtype, in shards of at most 5 GB.
        tokenizer_dir: whose tokenizer files are copied along.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name if name.startswith("lm_head.") else f"model.{name}"] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with new_folder(folder) as temporary:
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            save_file(shard, temporary / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")
        config.extra = {key: value for key, value in config.extra.items() if key != "torch_dtype"} | {"dtype": dtype}
        config.save(temporary)
        for name in TOKENIZER_FILES if tokenizer_dir else ():
            if (tokenizer_dir / name).is_file():
                shutil.copyfile(tokenizer_dir / name, temporary / name)


@contextmanager
def new_folder(folder: str | Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder`, whole, when the block ends without an error, and vanishes otherwise.

    Everything in it is flushed to disk before the rename, so a crash leaves either all of it or nothing.

    Args:
        folder: where the result goes.
        replace: whether something already there is replaced (also whole). Otherwise it must be absent or empty.

    Raises:
        UserError: there is something at `folder` already.
    """
    folder = Path(folder)
    check_new_folder(folder, replace)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        flush(temporary)
        old = None
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
            folder.rename(old)
        temporary.rename(folder)
        flush(folder.parent, recurse=False)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(file: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, flush it and rename it to `file`: readers see the old one or the new one."""
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        write(temporary)
        flush(temporary)
        temporary.replace(file)
        flush(file.parent, recurse=False)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_folder(folder: Path, replace: bool = False) -> None:
    """Raise UserError unless a result may be written to `folder`: it is absent, empty, or may be replaced."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not replace)):
        raise UserError(f"{folder}: exists already. Give another folder, or move that one away")


def flush(path: Path, recurse: bool = True) -> None:
    """fsync a file or a folder, and with `recurse` everything in it, so that a rename comes after its contents."""
    for path in [*(path.rglob("*") if recurse else ()), path]:  # noqa: B020
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _some(names: Iterable[str]) -> str:
    """Up to three of the names, for a message."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
