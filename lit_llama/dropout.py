"""Dropout whose masks do not depend on micro-batches or devices."""

# torch draws a mask by the shape of a tensor, so another micro-batch size would give another loss
# curve. Here the mask of a token follows from the seed, the step, its sample and its position. A
# table of 4,096 random mask rows is made once per width; a sample starts at a hashed row and walks
# down. So a step costs one gather and no random numbers.

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

TABLE_ROWS = 4096
_rows: Tensor | None = None  # (tokens,) int64: the table row of each token of the micro-batch


@contextmanager
def token_rows(
    seed: int, step: int, sample_ids: list[int], lengths: list[int], device: torch.device
) -> Iterator[None]:
    """Set the dropout rows of a micro-batch. Its forward and backward pass run inside."""
    global _rows
    rows = []
    for sample_id, length in zip(sample_ids, lengths, strict=True):
        # Python hashes tuples of integers alike in every process.
        first = hash((seed, step, sample_id)) % TABLE_ROWS
        rows.append(torch.arange(first, first + length))
    _rows = torch.cat(rows).to(device, non_blocking=True)
    try:
        yield
    finally:
        _rows = None


def token_dropout(x: Tensor, p: float, name: str) -> Tensor:
    """Zero features of x with probability p and scale the others by 1 / (1 - p)."""
    # x is (tokens, features), or (1, length, features) for the prompt of an adapter. Each layer, by
    # its `name`, uses other masks. Outside of `token_rows` this is `F.dropout`.
    if p == 0.0:
        return x
    mask = token_mask(p, name, x)
    return F.dropout(x, p) if mask is None else x * mask() * (1 / (1 - p))


def token_mask(p: float, name: str, x: Tensor) -> Callable[[], Tensor] | None:
    """Return a function that makes the mask for x, of zeros and ones; None without `token_rows`."""
    # A function, because a mask is cheaper to gather twice than to keep for the backward pass.
    if _rows is None:
        return None
    # The prompt of an adapter belongs to no sample: its rows count from zero.
    rows = _rows if x.dim() == 2 else torch.arange(x.size(-2), device=x.device)
    rows = (rows + zlib.crc32(name.encode())) % TABLE_ROWS
    table = _mask_table(p, x.size(-1), x.dtype, x.device)
    return lambda: table.index_select(0, rows)


@lru_cache(maxsize=8)
def _mask_table(p: float, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (TABLE_ROWS, features) of zeros, with probability p, and ones."""
    generator = torch.Generator().manual_seed(features)
    uniform = torch.rand(TABLE_ROWS, features, dtype=torch.float32, generator=generator)
    return (uniform >= p).to(device=device, dtype=dtype)
