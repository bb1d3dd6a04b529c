"""Answer a prompt with a LoRA, merged into its base. Guide: howto/inference.md"""

from pathlib import Path

import torch

from lit_llama import LLaMA, Tokenizer, load_model
from lit_llama.adapter import load_adapter
from lit_llama.cli import run
from lit_llama.distributed import inference_dtype
from lit_llama.generation import answer
from lit_llama.lora import load_lora, merge_lora
from lit_llama.methods import base_folder, training_template


def main(
    lora_path: Path = Path("out/lora/alpaca"),
    checkpoint_dir: Path | None = None,
    template: str | None = None,
    precision: str = "bf16-true",
    **flags,
) -> None:
    """Answer a prompt with a LoRA, merged into its base. Guide: howto/inference.md

    Args:
        lora_path: the LoRA's folder, ours or PEFT's; an adapter that was trained with it is used too.
        checkpoint_dir: the base model's folder; default: the one that the LoRA names.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none; default: the training's, else alpaca.
        precision: bf16-true or 32-true.
    """

    def load(device: torch.device) -> tuple[LLaMA, Tokenizer, str]:
        base = checkpoint_dir or base_folder(lora_path)
        tokenizer = Tokenizer(base)
        model = load_model(base, device, inference_dtype(precision))
        load_lora(model, lora_path)
        merge_lora(model)
        if (lora_path / "adapter").is_dir():
            load_adapter(model, lora_path / "adapter")
        return model, tokenizer, template or training_template(lora_path) or "alpaca"

    answer(load, **flags)


if __name__ == "__main__":
    run(main)
