"""Faster modules in place of the plain ones in lit_llama/*.py, equal to them up to rounding.

`use_fast_paths(model)` swaps them in for training, `decoding.optimize_for_inference` for decoding.
"""

from lit_llama.fast.modules import use_fast_paths

__all__ = ["use_fast_paths"]
