"""Lit-LLaMA: a readable LLaMA, and the methods to finetune it."""

from lit_llama.checkpoint import load_model
from lit_llama.config import LLaMAConfig
from lit_llama.errors import UserError
from lit_llama.model import LLaMA
from lit_llama.tokenizer import Tokenizer

__all__ = ["LLaMA", "LLaMAConfig", "Tokenizer", "UserError", "load_model"]
__version__ = "1.4.0"
