"""Subclasses of the book's modules that save less for the backward pass."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lit_llama.dropout import token_mask
from lit_llama.fast import functions
from lit_llama.fast.packing import can_pack
from lit_llama.fast.recompute import recompute
from lit_llama.fast.short_attention import MAX_SAMPLE_TOKENS, LengthBuckets, ShortAttentionFunction
from lit_llama.lora import LoRALinear
from lit_llama.model import MLP, Attention, Context, LLaMA, RMSNorm, Rope


def use_fast_paths(model: LLaMA) -> None:
    """Swap the classes of all modules for their fast counterparts, in place, before sharding.

    Parameters, names and hooks stay. Modules of other classes are left alone.
    """
    for module in model.modules():
        module.__class__ = FAST.get(type(module), type(module))


class FastLLaMA(LLaMA):
    """Compute the loss in chunks, so that the full logits are never materialized."""

    # Labels whose logits are in memory at once, and those in fp32, which fit into a CPU's cache.
    loss_chunk, loss_rows = 256, 16
    packs_weights = False  # those of the frozen layers, when they are loaded

    def use_kernels(self, kernels: Collection[str]) -> None:
        """Choose "packed", "short_attention", both or none, for training on the CPU."""
        # DoRA reads the weight itself at each step.
        has_dora = any(
            name.endswith("lora_magnitude_vector") for name, _ in self.named_parameters()
        )
        can = can_pack(self.embed_tokens.weight.dtype) and not has_dora
        self.packs_weights = can and "packed" in kernels
        for module in self.modules():
            if isinstance(module, FastAttention):
                module.is_short = "short_attention" in kernels

    def cross_entropy_sum(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        if type(head) not in (nn.Linear, nn.Embedding):
            # A method wraps the head: let autograd find its gradients, chunk by chunk.
            parts = (x.split(self.loss_chunk) for x in (hidden_states, labels))
            plain = super().cross_entropy_sum
            return torch.stack([recompute(plain, *part) for part in zip(*parts, strict=True)]).sum()
        # The gradient of a weight that trains is as large as that many rows of logits, and is
        # best computed in one piece.
        weight, chunk = head.weight, self.loss_chunk
        if weight.requires_grad:
            chunk = max(chunk, weight.size(1))
        if not torch.is_grad_enabled():
            weight = weight.detach()  # the function computes gradients in its forward pass
        options = (chunk, self.loss_rows)
        return functions.CrossEntropyFunction.apply(hidden_states, weight, labels, *options)


class FastAttention(Attention):
    """RoPE that saves only its table; matmul attention for short samples on the CPU."""

    is_short = True  # attends by matmuls on the CPU

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        rotate = functions.RoPEFunction.apply
        return rotate(query, *rope), rotate(key, *rope), value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        seqs = context.seqs
        trains = torch.is_grad_enabled() and context.kv_cache is None
        on_cpu = query.device.type == "cpu" and self.is_short
        if not (trains and on_cpu and seqs.max_length <= MAX_SAMPLE_TOKENS):
            return super().attend(query, key, value, context)
        if not hasattr(seqs, "buckets"):  # the same for all layers
            seqs.buckets = LengthBuckets(seqs.lengths)
        return ShortAttentionFunction.apply(query, key, value, seqs.buckets)


class FastMLP(MLP):
    """SwiGLU that saves only its two factors."""

    def forward(self, x: Tensor) -> Tensor:
        inner = functions.SwiGLUFunction.apply(self.gate_proj(x), self.up_proj(x))
        return self.down_proj(inner)


class FastRMSNorm(RMSNorm):
    """RMSNorm that saves only its input."""

    def forward(self, x: Tensor) -> Tensor:
        return functions.RMSNormFunction.apply(x, self.weight, self.eps)


class FastLoRALinear(LoRALinear):
    """LoRA that adds its update in place and saves only x and the (tokens, r) product."""

    def forward(self, x: Tensor) -> Tensor:
        # DoRA and the 3-D prompt of an adapter take the plain path, and so does evaluation.
        if self.lora_magnitude_vector is not None or x.dim() != 2 or not torch.is_grad_enabled():
            return super().forward(x)
        y = self.base(x)
        x = x.to(y.dtype)
        p = self.dropout if self.training else 0.0
        mask = token_mask(p, self.name, x) if p > 0 else None
        if p > 0 and mask is None:  # outside of `token_rows`
            return y + self.update(x)
        a, b = self.lora_A.weight.to(y.dtype), self.lora_B.weight.to(y.dtype)
        return functions.LoRAFunction.apply(y, x, a, b, self.scaling / (1 - p), mask)

    def update(self, x: Tensor) -> Tensor:
        return recompute(super().update, x)


FAST = {
    LLaMA: FastLLaMA,
    Attention: FastAttention,
    MLP: FastMLP,
    RMSNorm: FastRMSNorm,
    LoRALinear: FastLoRALinear,
}
