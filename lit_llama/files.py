"""Files that are whole: safetensors and pickled tensors read with care, and writing that leaves the old or the new."""

import ctypes
import errno
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_llama.errors import UserError

MAX_FILE_BYTES = 5 * 10**9
MAX_JSON_BYTES = 16 * 10**6  # in memory, JSON may take thirty times as much
MAX_TOKENIZER_BYTES = 10**8


def check_file(file: Path, max_bytes: int | None = None, hint: str = "") -> None:
    """Raise UserError unless `file` is a file, of at most `max_bytes`: opening a pipe would wait for ever."""
    try:
        size, is_file = file.stat().st_size, file.is_file()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}){hint}") from None
    if not is_file or size > (max_bytes or size):
        reason = f"has {size:,} bytes, which is over {max_bytes:,}" if is_file else "is no file"
        raise UserError(f"{file}: cannot be read ({reason}){hint}")


def read_text(file: Path, max_bytes: int | None = None, hint: str = "") -> str:
    """The text of a UTF-8 file, with or without BOM. `hint` is put behind what is said of one that cannot be read.

    Raises UserError as `check_file` does, and where it holds other bytes.
    """
    check_file(file, max_bytes, hint)
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start}). Save it as UTF-8 first") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}){hint}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{file}, line {line}: holds a NUL, so it is no UTF-8 text. Save it as UTF-8 first")
    return text


@contextmanager
def open_safetensors(file: Path) -> Iterator[safe_open]:
    """`safe_open` for reading on the CPU. Raises UserError where the file is missing, cut off or malformed."""
    check_file(file, hint=". Download or write it again")

    def damaged(error: Exception) -> UserError:
        return UserError(f"{file}: damaged or cut off ({error}). Download or write it again")

    try:
        opened = safe_open(file, framework="pt")
    except (SafetensorError, OSError, RuntimeError) as error:  # the last of torch, which maps the file
        raise damaged(error) from None
    try:
        with opened as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise damaged(error) from None


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, memory-mapped, and its metadata. Raises UserError as `open_safetensors`."""
    with open_safetensors(file) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118


def header_template(file: Path) -> str | None:
    """The prompt template of the training in a safetensors header, None where it does not say."""
    with open_safetensors(file) as handle:
        return (handle.metadata() or {}).get("template") or None


def load_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` or `.pth`, memory-mapped. Raises UserError for others."""
    check_file(file, hint=". Download it again")
    try:
        _check_archive(file)
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{file}: refused, its pickle holds more than tensors (it could run code)") from None
    except Exception as error:  # torch raises a dozen kinds for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: damaged or cut off ({reason}). Download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise UserError(f"{file}: should hold named tensors and nothing else")
    for name, tensor in tensors.items():
        # neither sparse, quantized, without data, nor larger than what the file holds for it
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
            raise UserError(f"{file}: should hold named tensors and nothing else, {name} is another kind")
        if tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{file}: damaged, {name} is larger than what the file holds for it. Download it again")
    return tensors


def _check_archive(file: Path) -> None:
    """Raise ValueError for a `.bin` or `.pth` that would be larger in memory: torch itself compresses nothing."""
    if zipfile.is_zipfile(file):  # else torch says what it is
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("compressed")
        if sum(part.file_size for part in parts) > file.stat().st_size:
            raise ValueError("its parts are larger than itself")


def save_tensors(tensors: dict[str, Tensor], file: Path, **metadata: str) -> None:
    """`save_file` of safetensors, with a full disk as an OSError instead of the library's own exception."""
    try:
        save_file(tensors, file, {"format": "pt"} | metadata)
    except SafetensorError as error:
        raise OSError(None, f"cannot be written ({error})", str(file)) from None
    # the library orders the metadata at random; here the same content always makes the same file
    with file.open("r+b") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        handle.seek(8)
        handle.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))
    file.chmod(file.parent.stat().st_mode & 0o666)  # the library lets nobody but the owner read it


def cut_into_files(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The tensors, in order, as groups of at most 5 GB (or of one larger tensor); no more than one is held."""
    group: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if group and sum(t.nbytes for t in group.values()) + tensor.nbytes > MAX_FILE_BYTES:
            yield group
            group = {}
        group[name] = tensor
    if group:
        yield group


def check_new_folder(folder: Path, problem: str = "exists already. Give another folder, or move that one away") -> None:
    """Raise UserError, which says `problem`, unless `folder` is absent or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: {problem}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path for a file or folder that takes the place of `path`, whole, once the block has ended.

    It is flushed before, and removed if the block ends in an error: readers see the old one or the new one. Where the
    system cannot exchange two folders, these have for a moment neither.
    """
    (path := Path(os.path.realpath(path))).parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    try:
        yield temporary
        flush(temporary)
        if path.exists() and not (path.is_dir() if temporary.is_dir() else path.is_file()):
            raise FileExistsError(errno.EEXIST, "is there, and is something else than what is to be written", str(path))
        if not (path.is_dir() and exchange(temporary, path)):  # after which `temporary` is the old one
            if path.is_dir():  # a file is replaced by the rename itself
                path.rename(old)
            temporary.rename(path)
        _fsync(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (temporary, old):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def exchange(one: Path, two: Path) -> bool:
    """Let two folders have each other's name, at once: Linux's renameat2. False where system or disk cannot."""
    current_folder, exchanging = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return renameat2(current_folder, os.fsencode(one), current_folder, os.fsencode(two), exchanging) == 0


def flush(path: Path) -> None:
    """Return once a file, or a folder with all that is in it, is on the disk itself."""
    for part in (*path.rglob("*"), path):
        _fsync(part)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
