"""LLaMA: Touvron et al. 2023 (arXiv 2302.13971), with Llama 2's grouped-query attention and Llama 3's RoPE scaling.

Module names are those of Hugging Face's checkpoints without the leading `model.`, and so are the weights' layouts: RoPE
rotates the two halves of a head (`q[:d/2]` with `q[d/2:]`), not neighbouring pairs as Meta's files do. Tokens of all
samples lie end to end in one dimension; attention never crosses from one sample to the next. Nothing but parameters
lives on the modules, so a model on the meta device needs only its weights to run.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama import fast
from lit_llama.attention import KVCache, SampleLengths, causal_attention
from lit_llama.config import LLaMAConfig
from lit_llama.fast import recompute

LOSS_CHUNK = 256  # labels whose logits, (256, vocab_size) in fp32, are in memory at a time
Rope = tuple[Tensor, Tensor]  # cos, and sin with a minus in its first half, each (tokens, 1, head_dim), fp32


class LLaMA(nn.Module):
    """Token ids in, logits out."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # a tied head is the embedding itself, not a second parameter that must be kept equal
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        lengths: list[int] | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        """Predict each token's successor: logits (*input_ids.shape, vocab_size) in the compute dtype.

        Args:
            input_ids: (batch, seq) or, for samples laid end to end, (tokens,), int64 or int32.
            lengths: tokens in each sample, adding up to the number of tokens. Default: every row is one sample.
            positions: (labels,) tokens, counted over the flattened input, for the logits of these only.
            labels: (labels,) the successors at `positions`; asks for the cross entropy summed over them, a fp32 scalar.
            kv_cache: what `make_kv_cache` returned; samples fill its rows, then `input_ids` (batch, new) continue them.
        """
        rows, seq = input_ids.shape if input_ids.dim() == 2 else (1, input_ids.numel())
        samples = None
        if kv_cache is None or kv_cache.empty:
            samples = SampleLengths(lengths or [seq] * rows, input_ids.device)
        rope = rope_table(self.config, samples.positions if kv_cache is None else kv_cache.begin(seq, samples))
        hidden_states = self.embed_tokens(input_ids.flatten())  # (tokens, hidden)
        for layer in self.layers:
            hidden_states = layer(hidden_states, rope, samples, kv_cache)
        if kv_cache is not None:
            kv_cache.finish()
        hidden_states = self.norm(hidden_states)
        if labels is not None:
            return self.cross_entropy_sum(hidden_states[positions], labels)
        if positions is not None:
            return self.head(hidden_states[positions])
        return self.head(hidden_states).unflatten(0, input_ids.shape)

    def head(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden) -> logits (..., vocab_size)."""
        return (
            F.linear(hidden_states, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden_states)
        )

    def cross_entropy_sum(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """(labels, hidden), (labels,) -> scalar. A chunk's logits live only while it is computed, forward or back."""
        if fast.enabled and (self.lm_head is None or type(self.lm_head) is nn.Linear):
            weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
            # where the weight trains, its gradient is as large as that many rows of logits, and best made in one piece
            chunk = max(LOSS_CHUNK, weight.size(1)) if weight.requires_grad else LOSS_CHUNK
            return fast.LinearCrossEntropySum.apply(hidden_states, weight, labels, chunk)
        chunks = zip(hidden_states.split(LOSS_CHUNK), labels.split(LOSS_CHUNK), strict=True)
        loss_of = lambda x, y: F.cross_entropy(self.head(x).float(), y, reduction="sum")  # noqa: E731
        return torch.stack([recompute(loss_of, *chunk) for chunk in chunks]).sum()

    def make_kv_cache(self, batch_size: int, max_seq_length: int, static: bool = False) -> KVCache:
        """An empty cache for `max_seq_length` tokens a row, on the model's device and in its dtype."""
        c, weight = self.config, self.embed_tokens.weight
        shape = (c.num_hidden_layers, batch_size, c.num_key_value_heads, max_seq_length, c.head_dim)
        keys, values = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        return KVCache(keys, values, c.num_attention_heads // c.num_key_value_heads, static)


class Block(nn.Module):
    """One transformer layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LLaMAConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, rope: Rope, samples: SampleLengths | None, kv_cache: KVCache | None
    ) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), rope, samples, kv_cache)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Attention(nn.Module):
    """Multi-head or grouped-query self-attention with rotary positions."""

    def __init__(self, config: LLaMAConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=bias)

    def forward(
        self, hidden_states: Tensor, rope: Rope, samples: SampleLengths | None, kv_cache: KVCache | None
    ) -> Tensor:
        query, key, value = self.project(hidden_states, rope)
        return self.o_proj(self.attend(query, key, value, samples, kv_cache).flatten(1))

    def project(self, hidden_states: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, hidden) -> rotated query (tokens, heads, head_dim), rotated key, value (tokens, kv heads, .)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        return apply_rope(query, rope), apply_rope(key, rope), value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, samples: SampleLengths | None, kv_cache: KVCache | None
    ) -> Tensor:
        """What `project` gave -> (tokens, num_heads, head_dim)."""
        if kv_cache is None:
            return causal_attention(query, key, value, samples)
        return kv_cache.attend(self.index, query, key, value)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        return self.down_proj(fast.SwiGLU.apply(gate, up) if fast.training() else recompute(swiglu, gate, up))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467), computed in fp32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        if fast.training():
            return fast.RMSNormKeepingInput.apply(hidden_states, self.weight, self.eps)
        return recompute(rms_norm, hidden_states, self.weight, self.eps)


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed = F.rms_norm(hidden_states, weight.shape, eps=eps).to(hidden_states.dtype)
    # rounded before the weight, as the models were trained; once more where a trained weight is fp32
    return (weight * normed).to(hidden_states.dtype)


def rope_frequencies(config: LLaMAConfig, device: torch.device | None = None) -> Tensor:
    """Angle per position of each pair of features (Su et al. 2021, arXiv 2104.09864, eq. 15): (head_dim / 2,), fp32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    inv_freq = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":  # position interpolation, arXiv 2306.15595
        inv_freq = inv_freq / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":
        # Llama 3.1: long waves are slowed by `factor`, short ones are kept, those between are blended
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        waves = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        keep = ((waves - low) / (high - low)).clamp(0, 1)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / scaling["factor"]
    return inv_freq


def rope_table(config: LLaMAConfig, positions: Tensor) -> Rope:
    """cos and signed sin of the angles at `positions` (tokens,), each (tokens, 1, head_dim).

    In fp32 whatever the model's dtype: in bf16, position 257 would already be 256.
    """
    angles = positions[:, None].float() * rope_frequencies(config, positions.device)  # (tokens, head_dim / 2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate (tokens, heads, head_dim) by its tokens' angles, in fp32; the result has x's dtype."""
    return fast.Rotate.apply(x, *rope, rotate) if fast.training() else rotate(x, *rope)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(first, second) -> (first cos - second sin, second cos + first sin) for the halves of each head."""
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.size(-1) // 2, dims=-1), sin).to(x.dtype)
