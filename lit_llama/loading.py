"""A model from whatever folder a run has left: a LoRA's, an adapter's, or a whole model's."""

from pathlib import Path

import torch

from lit_llama.adapter import load_adapter
from lit_llama.checkpoint import checkpoint_template, load_model
from lit_llama.config import read_json
from lit_llama.errors import UserError
from lit_llama.lora import load_lora, merge_lora
from lit_llama.methods import CONFIG_FILE, base_folder, training_template
from lit_llama.model import LLaMA
from lit_llama.tokenizer import Tokenizer


def load_finetuned(
    path: Path, checkpoint_dir: Path | None, device: torch.device, dtype: torch.dtype
) -> tuple[LLaMA, Tokenizer, str]:
    """The model of the folder `path`, its tokenizer, and the prompt template that it was trained with.

    A LoRA, ours or PEFT's, is merged into its base, and an adapter that was trained with it put on top. Where the
    folder does not name the template: alpaca for a method, the folder's own (chat) or none for a model.
    `checkpoint_dir` is the base of a LoRA or adapter; default: the one that the folder names. Raises UserError where
    `path` is none of the three, or damaged.
    """
    base = model_folder(path, checkpoint_dir)
    tokenizer, model = Tokenizer(base), load_model(base, device, dtype)
    if base == path:
        return model, tokenizer, checkpoint_template(path) or ("chat" if tokenizer.chat_template else "none")
    if "method" in read_json(path / CONFIG_FILE):
        load_adapter(model, path)
    else:
        load_merged_lora(model, path)
    return model, tokenizer, training_template(path) or "alpaca"


def model_folder(path: Path, checkpoint_dir: Path | None) -> Path:
    """The whole model's folder: `path` itself, or the base of the LoRA or adapter there. Raises UserError for none."""
    if (path / CONFIG_FILE).is_file():
        return checkpoint_dir or base_folder(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no {CONFIG_FILE} and no config.json there. Give a LoRA, an adapter or a model")
    return path


def load_merged_lora(model: LLaMA, path: Path) -> None:
    """Merge a saved LoRA into its base, and put an adapter that was trained with it on top. Raises UserError."""
    load_lora(model, path)
    merge_lora(model)
    if (path / "adapter").is_dir():
        load_adapter(model, path / "adapter")


def chosen_folder(checkpoint_dir: Path | None, lora_path: Path | None, adapter_path: Path | None) -> Path:
    """The folder for `load_finetuned` among a script's three flags. Raises UserError for none, or for both methods."""
    if lora_path and adapter_path:
        raise UserError("--lora_path, --adapter_path: give one of them (an adapter inside a LoRA's folder is used too)")
    if folder := lora_path or adapter_path or checkpoint_dir:
        return folder
    raise UserError("--checkpoint_dir, --lora_path, --adapter_path: give the model to evaluate with one of them")
