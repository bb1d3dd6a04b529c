"""Merge a LoRA into its base and write the result as a model folder. Guide: howto/finetune_lora.md"""

from pathlib import Path

from lit_llama import UserError, load_model
from lit_llama.checkpoint import save_checkpoint, tokenizer_files
from lit_llama.cli import run
from lit_llama.distributed import inference_dtype
from lit_llama.files import check_new_folder
from lit_llama.lora import load_lora, merge_lora
from lit_llama.methods import base_folder, training_template


def main(lora_path: Path, out_dir: Path, checkpoint_dir: Path | None = None, precision: str = "bf16-true") -> None:
    """Merge a LoRA into its base and write the result as a Hugging Face model folder. Guide: howto/finetune_lora.md

    Example:
        python scripts/merge_lora.py --lora_path out/lora/alpaca --out_dir checkpoints/mine

    Args:
        lora_path: the LoRA's folder, ours or PEFT's.
        out_dir: where the model folder goes; must not exist.
        checkpoint_dir: the base model's folder; default: the one that the LoRA names.
        precision: bf16-true or 32-true, what the merged weights are saved in.
    """
    check_new_folder(out_dir)
    if (lora_path / "adapter").is_dir():
        raise UserError(f"{lora_path}: was trained with an adapter, which cannot be merged")
    base = checkpoint_dir or base_folder(lora_path)
    model = load_model(base, dtype=inference_dtype(precision))
    load_lora(model, lora_path)
    merge_lora(model)
    template = training_template(lora_path) or ""
    save_checkpoint(out_dir, model.config, model.named_parameters(), tokenizer_files(base), template)
    print(f"merged model in {out_dir}")


if __name__ == "__main__":
    run(main)
