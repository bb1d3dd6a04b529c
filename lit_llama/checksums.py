"""Folders that can tell whether they are whole: their `checksums.txt` has a line for each file, CRC-32 and name."""

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKSUMS = "checksums.txt"


def write_checksums(folder: Path) -> None:
    """Sum all that is in a folder; the last line of `checksums.txt` is that of the lines above it."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # zlib lets other threads run
        sums = pool.map(crc32, (folder / name for name in names))
        lines = "".join(f"{crc}  {name}\n" for crc, name in zip(sums, names, strict=True))
    (folder / CHECKSUMS).write_text(f"{lines}{zlib.crc32(lines.encode()):08x}  {CHECKSUMS}\n", "utf-8")


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder that has checksums: a file that is missing, cut off, or has but one other bit.

    None where it is whole, or was written by a version without checksums.
    """
    try:
        stored = (folder / CHECKSUMS).read_bytes()
        *lines, last = stored.splitlines(keepends=True) or [b""]
        if last != f"{zlib.crc32(b''.join(lines)):08x}  {CHECKSUMS}\n".encode():
            return f"{CHECKSUMS}: damaged or cut off"
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{CHECKSUMS}: cannot be read ({error.strerror})"

    def look_at(line: bytes) -> str | None:
        expected, _, name = line.decode(errors="replace").rstrip("\n").partition("  ")
        try:
            return None if crc32(folder / name) == expected else f"{name}: damaged or cut off"
        except FileNotFoundError:
            return f"{name}: missing"
        except (OSError, ValueError) as error:  # a disk that cannot read it back, say
            return f"{name}: cannot be read ({error})"

    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(look_at, lines)), None)


def crc32(file: Path) -> str:
    """A file's CRC-32 in eight hexadecimal digits, as `gzip` and `zip` have it."""
    crc = 0
    with file.open("rb") as source:
        while piece := source.read(1 << 20):
            crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"
