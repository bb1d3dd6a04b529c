"""Atomic writes, checksums, and reading of safetensors and pickled tensors without running code."""

# torch is imported where it is needed, for preparing data is twice as fast without

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from lit_llama.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MAX_FILE_BYTES = 5 * 10**9
CHECKSUMS = "checksums.txt"  # a line for each file of its folder: CRC-32 and name


def read_text(file: Path, hint: str = "") -> str:
    """Read a UTF-8 file, with or without a BOM."""
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start}). Save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}){hint}") from None


def read_prompts(file: Path) -> list[str]:
    """Read a prompt from each line that is not empty."""
    # not splitlines(), which also splits at characters such as U+2028
    lines = read_text(file, hint=". Pass a text file to --prompt_file").split("\n")
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{file}: holds no prompt. Write one in each line")
    return prompts


def open_safetensors(file: Path) -> safe_open:
    """Open a safetensors file (a context manager), on the CPU, memory-mapped."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, RuntimeError) as error:
        if file.is_file() and file.stat().st_size < 1000 and file.read_bytes()[:7] == b"version":
            raise UserError(
                f"{file}: a pointer of Git LFS, not the file. Run git lfs pull"
            ) from None
        problem = f"{file}: missing, truncated or corrupted ({error})"
        raise UserError(f"{problem}. Download or write it again") from None


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a safetensors file, memory-mapped, and its metadata."""
    with open_safetensors(file) as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return tensors, handle.metadata() or {}


def load_pickled(file: Path) -> dict[str, Tensor]:
    """Load the tensors of a `.bin` or `.pth` file, memory-mapped."""
    import torch

    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{file}: refused, holds more than tensors (it could run code)") from None
    except Exception as error:  # torch raises a dozen types for truncated files
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file}: truncated or corrupted ({reason}). Download it again") from None


def save_tensors(tensors: dict[str, Tensor], file: Path, **metadata: str) -> None:
    """Write a safetensors file. Equal content gives byte-identical files."""
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, {"format": "pt"} | metadata)
    except SafetensorError as error:  # a full disk
        raise OSError(None, f"cannot be written ({error})", str(file)) from None
    with file.open("r+b") as handle:  # the library orders the metadata at random
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        handle.seek(8)
        handle.write(text.encode().ljust(size))
    file.chmod(file.parent.stat().st_mode & 0o666)  # it also makes the file private


def split_into_files(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Split a stream of tensors into groups of at most 5 GB; only one group is in memory."""
    group: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if group and sum(t.nbytes for t in group.values()) + tensor.nbytes > MAX_FILE_BYTES:
            yield group
            group = {}
        group[name] = tensor
    yield group


def require_empty_dir(folder: Path, problem: str = "exists already. Pass another folder") -> None:
    """Raise UserError unless `folder` is missing or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: {problem}")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, renamed to `path` unless the block raises."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    try:
        yield temporary
        _fsync(*temporary.rglob("*"), temporary)
        if path.is_dir() and temporary.is_dir():  # rename replaces a file, but not a folder
            path.rename(old)
        temporary.rename(path)
        _fsync(path.parent)
    finally:
        if old.exists() and not path.exists():  # the second rename has failed
            old.rename(path)
        for leftover in (temporary, old):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _fsync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_checksums(folder: Path) -> None:
    """Write `checksums.txt` for all files of a folder."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    (folder / CHECKSUMS).write_text("\n".join(_checksums(folder, names)) + "\n")


def verify_checksums(folder: Path) -> str | None:
    """Return the first missing or corrupted file, None if all are intact or not listed."""
    if not (folder / CHECKSUMS).exists():
        return None
    lines = (folder / CHECKSUMS).read_text("utf-8", errors="replace").splitlines()
    stored = [line for line in lines if not line.endswith(f"  {CHECKSUMS}")]  # one in version 1.4
    found = _checksums(folder, [line[10:] for line in stored])
    broken = [line[10:] for line, other in zip(stored, found, strict=True) if line != other]
    return f"{broken[0]}: missing or corrupted" if broken else None


def _checksums(folder: Path, names: list[str]) -> list[str]:
    def line(name: str) -> str:
        crc = 0
        try:
            with (folder / name).open("rb") as file:
                while chunk := file.read(1 << 20):
                    crc = zlib.crc32(chunk, crc)
        except (OSError, ValueError):
            return "unreadable"
        return f"{crc:08x}  {name}"

    with ThreadPoolExecutor() as pool:  # zlib releases the GIL
        return list(pool.map(line, names))
