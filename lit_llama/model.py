"""LLaMA in plain PyTorch."""

# Follows Touvron et al. 2023 (arXiv 2302.13971), with the grouped-query attention of Llama 2 and
# the RoPE scaling of Llama 3. What to know before reading:
# - All samples of a batch are packed in one dimension, (tokens, ...), without padding. Only
#   attention and RoPE need to know where a sample starts: `PackedSequences` tells them.
# - Modules are named as in Hugging Face checkpoints, without the leading `model.`, and weights have
#   the layout of those files: RoPE rotates the two halves of a head, not neighboring pairs.
# - The model has no buffers: one on the meta device only needs its weights.

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.config import LLaMAConfig
from lit_llama.kv_cache import KVCache

Rope = tuple[Tensor, Tensor]  # cos and signed sin of `rope_table`
# Lets `varlen_attn` take fewer key heads than query heads; torch 2.11 does so without.
GQA = {} if torch.__version__ < (2, 12) else {"enable_gqa": True}


class PackedSequences:
    """Boundaries of the sequences of `lengths` tokens that are packed on `device`."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths = lengths
        self.max_length = max(lengths)
        self.uniform = len(set(lengths)) == 1
        # Made on the CPU and copied without waiting, so that the GPU is not stalled.
        positions = torch.cat([torch.arange(length) for length in lengths])
        index, total = torch.arange(len(lengths)), sum(lengths)
        index = index.repeat_interleave(torch.tensor(lengths), output_size=total)
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        self.positions = positions.to(device, non_blocking=True)  # (tokens,)
        self.batch_index = index.to(device, non_blocking=True)  # (tokens,)
        self.cu_seqlens = ends.to(device, non_blocking=True)  # (sequences + 1,), int32


class Context(NamedTuple):
    """Inputs of all layers besides the hidden states; built once per forward pass."""

    rope: Rope
    seqs: PackedSequences | None  # None if the tokens continue a cache
    kv_cache: KVCache | None


class LLaMA(nn.Module):
    """The language model: token ids in, logits out."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        vocab_size, size = config.vocab_size, config.hidden_size
        layers = range(config.num_hidden_layers)
        self.embed_tokens = nn.Embedding(vocab_size, size)
        self.layers = nn.ModuleList(Block(config, index) for index in layers)
        self.norm = RMSNorm(size, config.rms_norm_eps)
        # A tied head is the embedding itself, not a second parameter to be kept equal to it.
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(size, vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        lengths: list[int] | None = None,
        label_positions: Tensor | None = None,
        labels: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        """Compute the logits of the next token, or the loss if labels are given.

        Args:
            input_ids: (batch, seq), or (tokens,) for packed sequences; int64 or int32.
            lengths: length of each packed sequence. Default: each row is one sequence.
            label_positions: (labels,) indices into the flattened input: compute logits only there.
            labels: (labels,) the tokens that follow `label_positions`.
            kv_cache: from `make_kv_cache`. The first call fills it, the next ones continue it.

        Returns logits (*input_ids.shape, vocab_size) or (labels, vocab_size) in the compute dtype,
        or with labels their summed cross entropy, a scalar in fp32.
        """
        seq, seqs = input_ids.size(-1), None
        if kv_cache is None or kv_cache.empty:
            if lengths is None:
                lengths = [seq] * (input_ids.numel() // seq)
            seqs = PackedSequences(lengths, input_ids.device)
        # The position of each token in its own sequence, after those that are cached.
        if kv_cache is None:
            positions = seqs.positions
        else:
            positions = kv_cache.allocate(seq, seqs)
        rope = rope_table(self.config, positions)
        context = Context(rope, seqs, kv_cache)

        hidden_states = self.embed_tokens(input_ids.flatten())  # (tokens, hidden)
        for layer in self.layers:
            hidden_states = layer(hidden_states, context)
        if kv_cache is not None:
            kv_cache.advance()
        hidden_states = self.norm(hidden_states)
        # Logits are by far the largest tensor of a step, so compute only those that are needed.
        if label_positions is None:
            return self.head(hidden_states).unflatten(0, input_ids.shape)
        hidden_states = hidden_states[label_positions]  # (labels, hidden)
        if labels is None:
            return self.head(hidden_states)
        return self.cross_entropy_sum(hidden_states, labels)

    def head(self, hidden_states: Tensor) -> Tensor:
        """Project (..., hidden) to logits (..., vocab_size)."""
        if self.lm_head is None:
            return F.linear(hidden_states, self.embed_tokens.weight)
        return self.lm_head(hidden_states)

    def cross_entropy_sum(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """Sum the cross entropy of (labels, hidden) and (labels,) in fp32."""
        logits = self.head(hidden_states).float()
        return F.cross_entropy(logits, labels, reduction="sum")

    def make_kv_cache(self, batch_size: int, max_seq_length: int) -> KVCache:
        """Allocate an empty cache on the model's device and in its dtype."""
        like = self.embed_tokens.weight
        shape = (batch_size, max_seq_length)
        return KVCache(self.config, *shape, like.device, like.dtype)


class Block(nn.Module):
    """One transformer layer: attention and MLP, each normed first and added to its input."""

    def __init__(self, config: LLaMAConfig, index: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (tokens, hidden)
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Multi-head or grouped-query self-attention with rotary position embeddings."""

    def __init__(self, config: LLaMAConfig, index: int) -> None:
        super().__init__()
        self.index = index  # of the layer, which the KV cache is addressed by
        self.head_dim = config.head_dim
        size, bias = config.hidden_size, config.attention_bias
        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(size, query_size, bias=bias)
        self.k_proj = nn.Linear(size, key_size, bias=bias)
        self.v_proj = nn.Linear(size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, size, bias=bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (tokens, hidden)
        query, key, value = self.project(x, context.rope)
        attended = self.attend(query, key, value, context)
        return self.o_proj(attended.flatten(1))

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated query and key, and value, each (tokens, its heads, head_dim)."""
        query = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        key = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return apply_rope(query, rope), apply_rope(key, rope), value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """Attend, with or without the KV cache. Returns (tokens, num_heads, head_dim)."""
        _, seqs, kv_cache = context
        if kv_cache is not None:
            kv_cache.append(self.index, key, value)
        # In training, and for a prompt, all keys are at hand: the cache is not read.
        if seqs is not None:
            return causal_attention(query, key, value, seqs)
        return kv_cache.attend(self.index, query)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.mlp_bias
        inner = config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # torch computes the norm itself in fp32. Round before the weight is applied, as the models
        # were trained; round again because a weight that is trained is fp32.
        normed = F.rms_norm(x, self.weight.shape, eps=self.eps)
        return (self.weight * normed.to(x.dtype)).to(x.dtype)


def rope_frequencies(config: LLaMAConfig, device: torch.device | None = None) -> Tensor:
    """Angle per position of each feature pair, (head_dim / 2,) in fp32.

    RoFormer (Su et al. 2021, arXiv 2104.09864), eq. 15.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        # Position interpolation (arXiv 2306.15595).
        inv_freq = inv_freq / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":
        # Long waves are slowed down by `factor`, short ones stay, those between are blended.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        old_context = scaling["original_max_position_embeddings"]
        waves = old_context * inv_freq / (2 * math.pi)
        keep = ((waves - low) / (high - low)).clamp(0, 1)
        slowed = inv_freq / scaling["factor"]
        inv_freq = keep * inv_freq + (1 - keep) * slowed
    return inv_freq


def rope_table(config: LLaMAConfig, positions: Tensor) -> Rope:
    """Return cos and signed sin at `positions` (tokens,), each (tokens, 1, head_dim)."""
    # Always fp32: in bf16, position 257 would be rounded to 256.
    inv_freq = rope_frequencies(config, positions.device)
    angles = positions[:, None].float() * inv_freq  # (tokens, head_dim / 2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    # The first half of sin is negated, so that `apply_rope` is a single addcmul.
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the halves (a, b) of each head to (a cos - b sin, b cos + a sin).

    x is (tokens, heads, head_dim); computed in fp32, returned in the dtype of x.
    """
    cos, sin = rope
    wide = x.float()
    swapped = wide.roll(x.size(-1) // 2, dims=-1)  # (b, a)
    return torch.addcmul(wide * cos, swapped, sin).to(x.dtype)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, seqs: PackedSequences) -> Tensor:
    """Compute softmax(q k^T / sqrt(head_dim)) v causally within each packed sequence.

    query and result are (tokens, num_heads, head_dim), key and value (tokens,
    num_key_value_heads, head_dim), all of one dtype.
    """
    groups = query.size(1) // key.size(1)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention import varlen

        # One FlashAttention kernel for all sequences, causal by its window. Slow to import.
        ends = (seqs.cu_seqlens, seqs.cu_seqlens)
        sizes = (seqs.max_length, seqs.max_length)
        options = dict(window_size=(-1, 0), **GQA)
        return varlen.varlen_attn(query, key, value, *ends, *sizes, **options)

    # Elsewhere, one call for each sequence, or a single one if all lengths are equal.
    lengths, count = seqs.lengths, 1
    if seqs.uniform:
        lengths, count = [sum(lengths)], len(lengths)
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    options = dict(is_causal=True, enable_gqa=groups > 1)
    attended = []
    for part in parts:
        # (count * seq, heads, head_dim) -> (count, heads, seq, head_dim)
        part = [x.unflatten(0, (count, -1)) for x in part]
        q, k, v = (x.transpose(1, 2) for x in part)
        out = F.scaled_dot_product_attention(q, k, v, **options)
        attended.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(attended)
