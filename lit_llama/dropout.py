"""Dropout that does not depend on how samples are cut into micro-batches or spread over devices.

The usual dropout draws its mask by a tensor's layout, so another micro-batch size gives another loss curve. Here a
token's mask follows from the seed, the step, the sample and the token's place in it. Rows of 4,096 random masks are
drawn once; each sample starts at a row of its own and walks down, so a step costs a gather and no random numbers.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 4096
_rows: Tensor | None = None  # (tokens,) int64: the mask row of each token of the current micro-batch


def token_dropout(x: Tensor, p: float, name: str) -> Tensor:
    """Zero features of x (tokens, features) with probability `p` and scale the rest by 1 / (1 - p).

    Inside `token_rows` a token's mask is the same whatever lies beside it; elsewhere this is `F.dropout`. Layers of
    different `name` get different masks. What is no micro-batch's tokens, an adapter's prompt, is (1, length, features)
    and walks down the table from its first row.
    """
    if p == 0.0:
        return x
    mask = token_mask(p, name, x)
    return F.dropout(x, p) if mask is None else x * mask() * (1 / (1 - p))


def token_mask(p: float, name: str, x: Tensor) -> Callable[[], Tensor] | None:
    """What gives `token_dropout`'s mask, of zeros and ones, for x's shape and dtype; None outside `token_rows`."""
    if _rows is None:
        return None
    rows = _rows if x.dim() == 2 else torch.arange(x.size(-2), device=x.device)
    rows = (rows + zlib.crc32(name.encode())) % ROWS
    table = _keep_table(p, x.size(-1), x.dtype, x.device)
    return lambda: table.index_select(0, rows)


@contextmanager
def token_rows(seed: int, step: int, sample_ids: list[int], lengths: list[int], device: torch.device) -> Iterator[None]:
    """Name the samples of the micro-batch that goes through the model (and back) inside the block."""
    global _rows
    firsts = [hash((seed, step, index)) % ROWS for index in sample_ids]  # integers hash alike in every process
    rows = [torch.arange(first, first + length) for first, length in zip(firsts, lengths, strict=True)]
    _rows = torch.cat(rows).to(device, non_blocking=True)
    try:
        yield
    finally:
        _rows = None


@lru_cache(maxsize=8)
def _keep_table(p: float, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(ROWS, features) of zeros (with probability p) and ones."""
    uniform = torch.rand(ROWS, features, dtype=torch.float32, generator=torch.Generator().manual_seed(features))
    return (uniform >= p).to(device=device, dtype=dtype)
