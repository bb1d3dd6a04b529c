"""Answer a prompt with a model whose weights were all finetuned. Guide: howto/inference.md"""

from pathlib import Path

import torch

from lit_llama import LLaMA, Tokenizer, load_model
from lit_llama.checkpoint import checkpoint_template
from lit_llama.cli import run
from lit_llama.distributed import inference_dtype
from lit_llama.generation import answer


def main(
    checkpoint_dir: Path = Path("out/full/alpaca"),
    template: str | None = None,
    precision: str = "bf16-true",
    **flags,
) -> None:
    """Answer a prompt with a model whose weights were all finetuned. Guide: howto/inference.md

    Args:
        checkpoint_dir: the folder that finetune/full.py wrote.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none; default: the training's, else alpaca.
        precision: what the model computes in: bf16-true or 32-true.
    """

    def load(device: torch.device) -> tuple[LLaMA, Tokenizer, str]:
        tokenizer = Tokenizer(checkpoint_dir)
        model = load_model(checkpoint_dir, device, inference_dtype(precision))
        return model, tokenizer, template or checkpoint_template(checkpoint_dir) or "alpaca"

    answer(load, **flags)


if __name__ == "__main__":
    run(main)
