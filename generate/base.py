"""Answer a prompt with a model as it is. Guide: howto/inference.md"""

from pathlib import Path

import torch

from lit_llama import LLaMA, Tokenizer, load_model
from lit_llama.cli import run
from lit_llama.distributed import inference_dtype
from lit_llama.generation import answer


def main(
    checkpoint_dir: Path = Path("checkpoints/meta-llama/Llama-2-7b-hf"),
    template: str | None = None,
    precision: str = "bf16-true",
    **flags,
) -> None:
    """Answer a prompt with a model as it is. Guide: howto/inference.md

    Args:
        checkpoint_dir: the model folder.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none; default: chat where there is one.
        precision: what the model computes in: bf16-true or 32-true.
    """

    def load(device: torch.device) -> tuple[LLaMA, Tokenizer, str]:
        tokenizer = Tokenizer(checkpoint_dir)
        model = load_model(checkpoint_dir, device, inference_dtype(precision))
        return model, tokenizer, template or ("chat" if tokenizer.chat_template else "none")

    answer(load, **flags)


if __name__ == "__main__":
    run(main)
