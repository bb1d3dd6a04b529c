"""Split and rebuild model files with other contents: safetensors, GGUF, zips."""

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

from gguf import GGUFReader

GGUF_TYPES = {
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<?"),
    "u64": (10, "<Q"),
    "i64": (11, "<q"),
}


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the body."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join_safetensors(header: Any, body: bytes, size: int | None = None) -> bytes:
    """A file of a header, a value or bytes as they are, that says it is `size` bytes long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def read_zip(content: bytes) -> dict[str, bytes]:
    """The parts of a `.bin` or `.pth` by name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A `.bin` or `.pth` of such parts, with checksums that are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return file.getvalue()


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, list]]:
    """Metadata, and by name each tensor's dimensions, innermost first, type, and bytes."""
    reader = GGUFReader(file)
    metadata = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    return metadata, {
        t.name: [t.shape.tolist(), int(t.tensor_type), t.data.tobytes()] for t in reader.tensors
    }


def write_gguf(
    metadata: dict[str, Any],
    tensors: dict[str, list],
    *,
    version: int = 3,
    count: int | None = None,
    shift: int = 0,
) -> bytes:
    """Return a GGUF file that claims `count` tensors, the last one `shift` bytes off."""
    out = b"GGUF" + struct.pack(
        "<IQQ", version, len(tensors) if count is None else count % 2**64, len(metadata)
    )
    for key, value in metadata.items():
        number, content = _gguf_value(value)
        out += _gguf_text(key) + struct.pack("<I", number) + content
    body = b""
    for name, (shape, kind, content) in tensors.items():
        offset = len(body) + (shift if name == next(reversed(tensors)) else 0)
        dims = b"".join(struct.pack("<Q", size % 2**64) for size in shape)
        out += (
            _gguf_text(name)
            + struct.pack("<I", len(shape))
            + dims
            + struct.pack("<IQ", kind % 2**32, offset % 2**64)
        )
        body += content + bytes(-len(content) % 32)
    return out + bytes(-len(out) % 32) + body


def _gguf_text(text: str) -> bytes:
    content = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(content)) + content


def _gguf_value(value: Any) -> tuple[int, bytes]:
    """A type's number, and the value as that; what GGUF has no type for becomes text."""
    if isinstance(value, list):
        parts = [_gguf_value(element) for element in value] or [(8, b"")]
        kind = parts[0][0]
        same = [content for number, content in parts if number == kind]
        return 9, struct.pack("<IQ", kind, len(same) if value else 0) + b"".join(same)
    if isinstance(value, bool):
        kind = "bool"
    elif isinstance(value, int):
        kind = next(
            (kind for kind in ("u32", "i32", "u64", "i64") if _fits(value, GGUF_TYPES[kind][1])),
            None,
        )
    else:
        kind = "f32" if isinstance(value, float) and _fits(value, "<f") else None
    if kind is None:
        return 8, _gguf_text(value if isinstance(value, str) else repr(value))
    number, layout = GGUF_TYPES[kind]
    return number, struct.pack(layout, value)


def _fits(value: float, layout: str) -> bool:
    try:
        struct.pack(layout, value)
    except (struct.error, OverflowError):
        return False
    return True
