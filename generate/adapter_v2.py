"""Answer a prompt with a LLaMA-Adapter v2. Guide: howto/inference.md"""

from pathlib import Path

import torch

from lit_llama import LLaMA, Tokenizer, load_model
from lit_llama.adapter import load_adapter
from lit_llama.cli import run
from lit_llama.distributed import inference_dtype
from lit_llama.generation import answer
from lit_llama.methods import base_folder, training_template


def main(
    adapter_path: Path = Path("out/adapter_v2/alpaca"),
    checkpoint_dir: Path | None = None,
    template: str | None = None,
    precision: str = "bf16-true",
    **flags,
) -> None:
    """Answer a prompt with a LLaMA-Adapter v2. Guide: howto/inference.md

    Args:
        adapter_path: the adapter's folder.
        checkpoint_dir: the base model's folder; default: the one that the adapter names.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none; default: the training's.
        precision: what the model computes in: bf16-true or 32-true.
    """

    def load(device: torch.device) -> tuple[LLaMA, Tokenizer, str]:
        base = checkpoint_dir or base_folder(adapter_path)
        tokenizer = Tokenizer(base)
        model = load_model(base, device, inference_dtype(precision))
        load_adapter(model, adapter_path)
        return model, tokenizer, template or training_template(adapter_path) or "alpaca"

    answer(load, **flags)


if __name__ == "__main__":
    run(main)
