"""Answer a prompt with a LoRA, merged into its base, or with several, side by side. Guide: howto/inference.md"""

from pathlib import Path

import torch

from lit_llama import LLaMA, Tokenizer, UserError, load_model
from lit_llama.cli import run
from lit_llama.distributed import inference_dtype
from lit_llama.generation import answer
from lit_llama.loading import load_merged_lora
from lit_llama.many_loras import hold_loras
from lit_llama.methods import base_folder, training_template


def main(
    lora_path: list[Path] = [Path("out/lora/alpaca")],  # noqa: B006, never changed
    checkpoint_dir: Path | None = None,
    template: str | None = None,
    precision: str = "bf16-true",
    **flags,
) -> None:
    """Answer a prompt with a LoRA, merged into its base, or with several, side by side. Guide: howto/inference.md

    Example:
        python generate/lora.py --lora_path out/lora/alpaca --prompt "Recommend a movie."
        python generate/lora.py --lora_path out/lora/alice --lora_path out/lora/bob --prompt "Who are you?"

    Args:
        lora_path: the LoRA's folder, ours or PEFT's; an adapter that was trained with it is used too. Given several
            times, each of them answers, and all share one base in memory.
        checkpoint_dir: the base model's folder; default: the one that the LoRA names.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none; default: the training's, else alpaca.
        precision: what the model computes in: bf16-true or 32-true.
    """
    if len(set(lora_path)) < max(len(lora_path), 1):
        raise UserError("--lora_path: should be one folder or several different ones")

    def load(device: torch.device) -> tuple[LLaMA, Tokenizer, str | dict[str, str]]:
        base, *others = {checkpoint_dir or base_folder(path): None for path in lora_path}
        if others:
            raise UserError(f"--lora_path: these are for different models ({base}, {others[0]})")
        tokenizer, model = Tokenizer(base), load_model(base, device, inference_dtype(precision))
        templates = {str(path): template or training_template(path) or "alpaca" for path in lora_path}
        if len(lora_path) > 1:
            hold_loras(model, lora_path)
            return model, tokenizer, templates
        load_merged_lora(model, lora_path[0])
        return model, tokenizer, templates[str(lora_path[0])]

    answer(load, **flags)


if __name__ == "__main__":
    run(main)
