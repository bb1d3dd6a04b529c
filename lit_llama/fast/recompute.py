"""Blocks that compute activations again in the backward pass instead of saving them.

For a LoRA of LLaMA 7B on query and value, a block saves for each token, in multiples of the hidden
size: its input (1), the normed input (1), query, key and value (3), the attention's result (1), the
MLP's input (1), gate and up (5.4).
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lit_llama import dropout
from lit_llama.model import Block, Context, LLaMA, Rope


def recompute(function: Any, *args: Any) -> Any:
    """Call a function and save only its arguments: the backward pass calls it again."""
    # In training, dropout draws no random numbers. Elsewhere, draw the same ones again.
    draws = dropout.current_rows is None
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=draws)


class ActivationsBlock(Block):
    """A block that saves its input, query, key and value."""

    # The backward pass computes attention and three of the seven matmuls again: o_proj, gate and
    # up. It stops before the last one, down_proj, which saves nothing but its input.

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x, context)
        # Weights that train are copied to bf16 by autocast, and the copies would be saved. And a
        # method may wrap attention by a module that has one step only.
        trains = torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32
        if trains or not hasattr(self.self_attn, "attend"):
            return recompute(super().forward, x, context)
        query, key, value = self.project(x, context.rope)
        return recompute(self.attend, x, query, key, value, context)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Project the normed input, and save x in its place."""
        attention = getattr(self.self_attn, "base", self.self_attn)  # an adapter may wrap it
        normed = self.input_layernorm(x)
        own = weakref.ref(normed)
        again: Tensor | None = None  # for all projections, which free it together with `unpack`

        def pack(saved: Tensor) -> Tensor | None:
            return None if saved is own() else saved

        @torch.no_grad()
        def unpack(saved: Tensor | None) -> Tensor:
            nonlocal again
            if saved is None and again is None:
                again = self.input_layernorm(x)
            return again if saved is None else saved

        with saved_tensors_hooks(pack, unpack):
            return attention.project(normed, rope)

    def attend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, context: Context
    ) -> Tensor:
        """Compute the rest of the block, after the projections."""
        attended = self.self_attn.attend(query, key, value, context)
        attention = getattr(self.self_attn, "base", self.self_attn)
        x = x + attention.o_proj(attended.flatten(1))
        return x + self.mlp(self.post_attention_layernorm(x))


class WholeBlock(Block):
    """A block that saves its input only (activation checkpointing)."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return recompute(super().forward, x, context)


LEVELS = {"none": Block, "activations": ActivationsBlock, "block": WholeBlock}


def set_recompute(model: LLaMA, level: str) -> None:
    """Choose what each block computes again in the backward pass, in place."""
    for layer in model.layers:
        layer.__class__ = LEVELS[level]
