"""Dropout whose masks do not depend on micro-batches or devices."""

# torch draws a mask by the shape of a tensor, so another micro-batch size would give another loss
# curve. Here the mask of a token follows from the seed, the step, its sample and its position. A
# table of 4,096 random mask rows is made once per width; a sample starts at a hashed row and walks
# down. So a step costs one gather and no random numbers.

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Mask = tuple[Tensor, Tensor]  # a table, and a row of it for each token
TABLE_ROWS = 4096
current_rows: Tensor | None = None  # (tokens,) int64: the table row of each token


@contextmanager
def token_rows(
    seed: int, step: int, sample_ids: list[int], lengths: list[int], device: torch.device
) -> Iterator[None]:
    """Set the dropout rows of a micro-batch. Its forward and backward pass run inside."""
    global current_rows
    rows = []
    for sample_id, length in zip(sample_ids, lengths, strict=True):
        # Python hashes tuples of integers alike in every process.
        first = hash((seed, step, sample_id)) % TABLE_ROWS
        rows.append(torch.arange(first, first + length))
    current_rows = torch.cat(rows).to(device, non_blocking=True)
    try:
        yield
    finally:
        current_rows = None


def token_dropout(x: Tensor, p: float, name: str) -> Tensor:
    """Zero features of x with probability p and scale the others by 1 / (1 - p)."""
    # x is (tokens, features), or (1, length, features) for the prompt of an adapter. Each layer, by
    # its `name`, uses other masks. Outside of `token_rows` this is `F.dropout`.
    if p == 0.0:
        return x
    if (mask := token_mask(p, name, x)) is None:
        return F.dropout(x, p)
    table, rows = mask
    return x * table.index_select(0, rows) * (1 / (1 - p))


def token_mask(p: float, name: str, x: Tensor) -> Mask | None:
    """Return a table of zeros and ones and the row of each token; None without `token_rows`."""
    # Not the mask itself: it is cheaper to gather it twice than to keep it for the backward pass.
    if current_rows is None:
        return None
    # The prompt of an adapter belongs to no sample: its rows count from zero.
    rows = current_rows if x.dim() == 2 else torch.arange(x.size(-2), device=x.device)
    rows = (rows + zlib.crc32(name.encode())) % TABLE_ROWS
    # Bool is half of the memory traffic on a GPU. The CPU would convert it at each use.
    dtype = torch.bool if x.is_cuda else x.dtype
    return _mask_table(p, x.size(-1), dtype, x.device), rows


@lru_cache(maxsize=8)
def _mask_table(p: float, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (TABLE_ROWS, features) of zeros, with probability p, and ones."""
    generator = torch.Generator().manual_seed(features)
    uniform = torch.rand(TABLE_ROWS, features, dtype=torch.float32, generator=generator)
    return (uniform >= p).to(device=device, dtype=dtype)
