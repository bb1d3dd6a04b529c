"""Lit-LLaMA: the modules of this folder are the book, its subfolders are the machinery."""

from importlib import import_module
from typing import Any

__all__ = ["LLaMA", "LLaMAConfig", "Tokenizer", "UserError", "load_model"]
__version__ = "1.8.0"

_MODULES = dict(LLaMA="model", LLaMAConfig="config", Tokenizer="tokenizer", UserError="errors")
_MODULES["load_model"] = "storage.model_folder"


# imported on first use: `python finetune/lora.py --help` must not wait for torch
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
