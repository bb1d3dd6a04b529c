"""Merge a LoRA into its base model and write a model folder. Guide: howto/finetune_lora.md"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from lit_llama import UserError, load_model
from lit_llama.runtime.cli import run
from lit_llama.runtime.hardware import inference_dtype
from lit_llama.storage.files import require_empty_dir
from lit_llama.storage.methods import (
    load_method,
    prompt_files,
    prompt_format,
    resolve_model_dir,
    training_template,
)
from lit_llama.storage.model_folder import save_model_folder, stored_dtype
from lit_llama.wrapping import base_parameters


def main(
    lora_path: Path,
    out_dir: Path,
    checkpoint_dir: Path | None = None,
    precision: Literal["bf16-true", "32-true"] | None = None,
) -> None:
    """Merge a LoRA into its base model and write the result as a Hugging Face model folder.

    Tokenizer, chat template and end tokens in the LoRA's folder come before the base model's.
    Guide: howto/finetune_lora.md

    Example:
        python scripts/merge_lora.py --lora_path out/lora/alpaca --out_dir checkpoints/mine

    Args:
        lora_path: Folder of the LoRA, ours or PEFT's.
        out_dir: Output folder; must not exist.
        checkpoint_dir: Folder of the base model; default: the one that the LoRA names.
        precision: Dtype of the merged weights (default: that of the base model's).
    """
    require_empty_dir(out_dir)
    base = checkpoint_dir or resolve_model_dir(lora_path)
    dtype = stored_dtype(base) if precision is None else inference_dtype(precision)
    model = load_model(base, dtype=dtype)
    load_method(model, lora_path)  # merges whatever can be merged
    if len(list(model.parameters())) > len(base_parameters(model)):
        raise UserError(f"{lora_path}: was trained with an adapter, which cannot be merged")
    template = training_template(lora_path) or ""
    form = prompt_format(lora_path, base, template or "none")
    config = replace(model.config, eos_token_id=form.eos_ids)
    tensors, others = model.named_parameters(), prompt_files(lora_path, base, form)
    save_model_folder(out_dir, config, tensors, others, template)
    print(f"merged model in {out_dir}")


if __name__ == "__main__":
    run(main)
