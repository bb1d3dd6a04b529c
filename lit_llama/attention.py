"""Causal attention over samples that lie end to end, without padding and without a dense mask."""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from lit_llama import fast


class SampleLengths:
    """How a row of tokens on `device` is cut into samples of `lengths` tokens: made once a forward pass."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths, self.longest, self.uniform = lengths, max(lengths), len(set(lengths)) == 1
        self.positions = torch.cat([torch.arange(length) for length in lengths]).to(device, non_blocking=True)
        rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths), output_size=sum(lengths))
        self.rows = rows.to(device, non_blocking=True)
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.cu_seqlens = ends.to(device, non_blocking=True)  # (samples + 1,): where each sample starts and ends

    @cached_property
    def like(self) -> fast.LikeSamples:
        return fast.LikeSamples(self.lengths)

    def split(self, x: Tensor) -> Tensor:
        """(tokens, heads, head_dim) of samples of one length -> (samples, heads, seq, head_dim)."""
        return x.unflatten(0, (len(self.lengths), self.longest)).transpose(1, 2)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, samples: SampleLengths) -> Tensor:
    """Softmax(q k^T / sqrt(head_dim)) v within each sample, causally; grouped-query where there are fewer key heads.

    On CUDA in half precision this is one variable-length flash kernel; elsewhere one `scaled_dot_product_attention`
    a sample (or one for all where their lengths are equal). No token attends across a sample's border. Query and
    result are (tokens, num_heads, head_dim), key and value (tokens, num_key_value_heads, head_dim), of one dtype.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        longest, bounds, groups = samples.longest, samples.cu_seqlens, query.size(1) // key.size(1)
        if groups > 1:  # torch 2.11's kernel wants as many key as query heads when gradients are needed
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=(-1, 0))
    if fast.training() and query.device.type == "cpu" and samples.longest <= fast.SHORT:
        return fast.ShortAttention.apply(query, key, value, samples.like)
    if samples.uniform:
        return _sdpa(*(samples.split(t) for t in (query, key, value))).transpose(1, 2).flatten(0, 1)
    parts = zip(*(t.transpose(0, 1).split(samples.lengths, dim=1) for t in (query, key, value)), strict=True)
    attended = [_sdpa(*(t[None] for t in part))[0] for part in parts]  # each (heads, seq, head_dim)
    return torch.cat(attended, dim=1).transpose(0, 1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.size(1) != key.size(1))


class KVCache:
    """Keys and values of the tokens seen so far, allocated once, in the model's dtype. Rows may differ in length.

    Args:
        keys: (num_layers, batch, num_key_value_heads, max_seq_length, head_dim).
        values: the same.
        groups: how many query heads share a key head.
        static: attend to all of `max_seq_length` behind a mask, so that a step has the same shapes each time and no
            number of it is known to Python: what torch.compile and a CUDA graph ask for.
    """

    def __init__(self, keys: Tensor, values: Tensor, groups: int, static: bool = False) -> None:
        self.keys, self.values, self.groups, self.static = keys, values, groups, static
        self.rewind([0] * keys.size(1))

    def rewind(self, lengths: list[int]) -> None:
        """Keep only the first tokens of each row, that many."""
        self.longest, self.uniform, self.empty = max(lengths), len(set(lengths)) == 1, not any(lengths)
        self.lengths = torch.tensor(lengths, device=self.keys.device)  # (batch,): how many positions hold something

    def begin(self, new: int, samples: SampleLengths | None) -> Tensor:
        """Where the next tokens go, (tokens,): all samples' into an empty cache, or `new` more for each row.

        Raises ValueError for more tokens than the cache was made for.
        """
        self.samples, self.new, self.mask = samples, new, None
        room, device, batch = self.keys.size(3), self.keys.device, self.keys.size(1)
        if samples is not None:
            self.end = samples.longest
        else:
            self.end = room if self.static else self.longest + new
        if self.end > room:
            raise ValueError(f"{self.end} tokens do not fit into a KV cache of {room}")
        if samples is not None:
            self.rows, self.positions = samples.rows, samples.positions
        else:
            positions = self.lengths[:, None] + torch.arange(new, device=device)  # (batch, new)
            self.rows = torch.arange(batch, device=device).repeat_interleave(new, output_size=batch * new)
            self.positions = positions.flatten()
            if self.static or new > 1 or not self.uniform:  # else a single new token sees all there is
                seen = torch.arange(self.end, device=device) <= positions[..., None]  # (batch, new, end)
                groups = self.groups if new > 1 else 1
                self.mask = seen.repeat(1, groups, 1)[:, None]  # (batch, 1, groups * new, end)
        # by layer: what is seen, and where the tokens go if that is one slice, (batch, heads, end or new, head_dim)
        self.seen = [cache[:, :, :, : self.end].unbind(0) for cache in (self.keys, self.values)]
        self.slices = None
        if samples is None and self.uniform and not self.static:
            self.slices = [cache[:, :, :, self.longest : self.end].unbind(0) for cache in (self.keys, self.values)]
        return self.positions

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the new tokens' keys and values behind those of the tokens before, and attend to all, causally.

        Query and result are (tokens, num_heads, head_dim), key and value (tokens, num_key_value_heads, head_dim).
        """
        for number, (cache, tensor) in enumerate(((self.keys, key), (self.values, value))):
            if self.slices is None:
                cache[layer].transpose(1, 2)[self.rows, self.positions] = tensor
            else:
                self.slices[number][layer].copy_(tensor.unflatten(0, (-1, self.new)).transpose(1, 2))
        if self.samples is not None:
            return causal_attention(query, key, value, self.samples)
        keys, values = (seen[layer] for seen in self.seen)
        # the query heads that share a key head, and the new tokens, are one dimension
        (batch, heads, _, dim), groups = keys.shape, self.groups
        query = query.view(batch, self.new, heads, groups, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        attended = F.scaled_dot_product_attention(query, keys, values, self.mask)
        return (
            attended.view(batch, heads, groups, self.new, dim).permute(0, 3, 1, 2, 4).reshape(-1, heads * groups, dim)
        )

    def finish(self) -> None:
        """All layers have stored the tokens that `begin` announced."""
        if self.samples is not None:
            self.rewind(self.samples.lengths)
        else:
            self.lengths += self.new
            self.longest += 0 if self.static else self.new
