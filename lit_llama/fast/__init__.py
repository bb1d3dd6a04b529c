"""Faster modules in place of the plain ones in lit_llama/*.py, equal to them up to rounding.

`optimize_for_training` swaps them in for training, `decoding.optimize_for_inference` for decoding.
"""

from collections.abc import Collection

import torch

from lit_llama.fast.modules import use_fast_paths
from lit_llama.fast.recompute import set_recompute
from lit_llama.model import LLaMA

__all__ = ["optimize_for_training", "set_recompute", "use_fast_paths"]


def optimize_for_training(
    model: LLaMA,
    device: torch.device,
    fast_paths: bool = True,
    recompute: str | None = None,
    kernels: Collection[str] | None = None,
) -> None:
    """Swap in faster modules, and what the backward pass computes again, before sharding.

    `recompute` is "none", "activations" or "block". The default saves memory on a GPU and time on
    the CPU: "activations" there and "none" here. `kernels` are those for the CPU: "packed" weights
    and "short_attention"; the default is both, as far as the CPU has them.
    """
    on_gpu = device.type == "cuda"
    if fast_paths:
        use_fast_paths(model)
        if device.type == "cpu":
            model.use_kernels(("packed", "short_attention") if kernels is None else kernels)
        if on_gpu:
            model.loss_chunk, model.loss_rows = 512, 256
    set_recompute(model, recompute or ("activations" if on_gpu else "none"))
