"""Causal attention over samples that lie end to end, without padding and without a dense mask."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from lit_llama import fast
from lit_llama.fast import recompute

SHORT = 512  # tokens up to which `fast.short_attention` is the faster one on the CPU, forward and back


class SampleLengths:
    """How a row of tokens on `device` is cut into samples of `lengths` tokens: made once a forward pass."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths, self.longest, self.uniform = lengths, max(lengths), len(set(lengths)) == 1
        self.positions = torch.cat([torch.arange(length) for length in lengths]).to(device, non_blocking=True)
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.cu_seqlens = ends.to(device, non_blocking=True)  # (samples + 1,): where each sample starts and ends

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
    if samples.uniform:
        return _sdpa(*(samples.split(t) for t in (query, key, value))).transpose(1, 2).flatten(0, 1)
    parts = zip(*(t.transpose(0, 1).split(samples.lengths, dim=1) for t in (query, key, value)), strict=True)
    attended = [_attend(*part) for part in parts]  # each (heads, seq, head_dim)
    return torch.cat(attended, dim=1).transpose(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One sample, each (heads, seq, head_dim)."""
    if fast.enabled and query.device.type == "cpu" and query.requires_grad and query.size(1) <= SHORT:
        return recompute(fast.short_attention, query, key, value)
    return _sdpa(query[None], key[None], value[None])[0]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, is_causal: bool = True) -> Tensor:
    grouped = query.size(1) != key.size(1)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, enable_gqa=grouped)


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, allocated once, in the model's dtype."""

    keys: Tensor  # (num_layers, batch, num_key_value_heads, max_seq_length, head_dim)
    values: Tensor  # the same
    length: int = 0  # how many positions hold something

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the new tokens' keys and values behind those of the `length` tokens before, and attend to all.

        `length` itself moves on once a forward pass, after the last layer. Raises ValueError for more tokens than the
        cache was made for. Query and result are (batch, num_heads, new, head_dim), key and value (batch,
        num_key_value_heads, new, head_dim).
        """
        new, end = query.size(2), self.length + query.size(2)
        if end > self.keys.size(3):
            raise ValueError(f"{end} tokens do not fit into a KV cache of {self.keys.size(3)}")
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        if self.length == 0:
            return _sdpa(query, key, value)
        # the i-th new token sees everything up to itself; a single one sees all and needs no mask
        mask = None if new == 1 else torch.ones(new, end, dtype=torch.bool, device=query.device).tril(self.length)
        return _sdpa(query, self.keys[layer, :, :, :end], self.values[layer, :, :, :end], mask, is_causal=False)
