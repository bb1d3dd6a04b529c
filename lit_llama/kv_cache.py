"""KV cache: the keys and values of all tokens so far, so that each is computed only once."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.config import LLaMAConfig

if TYPE_CHECKING:
    from lit_llama.model import PackedSequences


class KVCache:
    """A preallocated cache for `batch_size` rows of at most `max_seq_length` tokens."""

    # A forward pass calls `allocate` once, `append` and `attend` in each layer, `advance` once.

    def __init__(
        self,
        config: LLaMAConfig,
        batch_size: int,
        max_seq_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        heads, layers = config.num_key_value_heads, config.num_hidden_layers
        shape = (layers, batch_size, heads, max_seq_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.groups = config.num_attention_heads // heads  # query heads that share a key head
        # What is stored. `length`, of the longest row, is known without asking the GPU.
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.length = 0
        self.uniform = True
        # The tokens of the current forward pass, set by `allocate`.
        self.new_tokens = 0
        self.seen, self.free = [], []  # views of keys and values, each by layer
        self.seqs: PackedSequences | None = None
        self.batch_index = self.positions = self.lengths[:0]  # (tokens,) each
        self.mask: Tensor | None = None  # (batch, 1, 1 or groups * new, visible length), bool

    @property
    def empty(self) -> bool:
        return self.length == 0

    def allocate(self, new_tokens: int, seqs: "PackedSequences | None" = None) -> Tensor:
        """Reserve room for `new_tokens` per row, or for packed prompts if the cache is empty.

        Returns the positions of the new tokens, (tokens,). Raises ValueError if they do not fit.
        """
        self.new_tokens, self.seqs, self.mask = new_tokens, seqs, None
        end = self.visible_length(new_tokens) if seqs is None else seqs.max_length
        if end > (room := self.keys.size(3)):
            raise ValueError(f"{end} tokens do not fit into a KV cache of {room}")
        start = self.length
        self.seen = [cache[:, :, :, :end].unbind() for cache in (self.keys, self.values)]
        self.free = [cache[:, :, :, start:end].unbind() for cache in (self.keys, self.values)]
        if seqs is not None:
            self.batch_index, self.positions = seqs.batch_index, seqs.positions
            return self.positions
        device, batch_size = self.keys.device, self.keys.size(1)
        self.batch_index = torch.arange(batch_size * new_tokens, device=device) // new_tokens
        positions = self.lengths[:, None] + torch.arange(new_tokens, device=device)  # (batch, new)
        self.positions = positions.flatten()
        # A single new token sees the whole cache, if all rows are equally long. Otherwise mask.
        if new_tokens > 1 or not self.uniform:
            seen = torch.arange(end, device=device) <= positions[..., None]  # (batch, new, end)
            # The mask of a single token serves all heads; see `attend` for the repetition.
            self.mask = seen.repeat(1, self.groups if new_tokens > 1 else 1, 1)[:, None]
        return self.positions

    def visible_length(self, new_tokens: int) -> int:
        """Number of cached positions that attention looks at, the new ones included."""
        return self.length + new_tokens

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the new keys and values, (tokens, num_key_value_heads, head_dim) each."""
        for seen, free, new in zip(self.seen, self.free, (key, value), strict=True):
            if self.seqs is None and self.uniform:
                # All rows end at the same place, so this is one slice: cheaper than an index.
                free[layer].copy_(new.unflatten(0, (-1, self.new_tokens)).transpose(1, 2))
            else:
                seen[layer].transpose(1, 2)[self.batch_index, self.positions] = new

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """Attend causally to all cached tokens; query and result (tokens, heads, head_dim)."""
        new, groups = self.new_tokens, self.groups
        keys, values = (part[layer] for part in self.seen)
        batch_size, heads, _, dim = keys.shape
        # The query heads that share a key head become rows of one matrix, beside the new tokens:
        # (batch * new, heads * groups, dim) -> (batch, heads, groups * new, dim)
        query = query.view(batch_size, new, heads, groups, dim)
        query = query.permute(0, 2, 3, 1, 4).flatten(2, 3)
        attended = F.scaled_dot_product_attention(query, keys, values, self.mask)
        attended = attended.view(batch_size, heads, groups, new, dim).permute(0, 3, 1, 2, 4)
        return attended.reshape(batch_size * new, heads * groups, dim)

    def advance(self) -> None:
        """Count the tokens of this forward pass as stored. Call after the last layer."""
        if self.seqs is not None:
            self.truncate(self.seqs.lengths)
        else:
            self.lengths += self.new_tokens
            self.length += self.new_tokens

    def truncate(self, lengths: list[int]) -> None:
        """Keep only the first tokens of each row."""
        self.lengths = torch.tensor(lengths, device=self.keys.device)
        self.length = max(lengths)
        self.uniform = len(set(lengths)) == 1
