"""Chat with a model, with a LoRA or several, or with an adapter. Guide: howto/inference.md"""

from pathlib import Path

import torch

from lit_llama import LLaMA, Tokenizer, UserError, load_model
from lit_llama.adapter import load_adapter
from lit_llama.chat import chat
from lit_llama.checkpoint import checkpoint_template
from lit_llama.cli import run
from lit_llama.distributed import inference_dtype
from lit_llama.many_loras import hold_loras
from lit_llama.methods import base_folder, training_template


def main(
    checkpoint_dir: Path | None = None,
    lora_path: list[Path] = [],  # noqa: B006, never changed
    adapter_path: Path | None = None,
    template: str | None = None,
    precision: str = "bf16-true",
    **flags,
) -> None:
    """Chat in the terminal. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends. Guide: howto/inference.md

    Example:
        python generate/chat.py --lora_path out/lora/alpaca
        python generate/chat.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --system "Be brief."

    Args:
        checkpoint_dir: the model folder; default: the base that the LoRA or adapter names.
        lora_path: a LoRA's folder, may be given several times; the first one answers, /lora changes to another.
        adapter_path: an adapter's folder, of either version; without --lora_path.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none; default: the training's.
        precision: what the model computes in: bf16-true or 32-true.
    """
    if not (checkpoint_dir or lora_path or adapter_path) or (lora_path and adapter_path):
        raise UserError("--checkpoint_dir, --lora_path, --adapter_path: give a model, LoRAs or an adapter to chat with")

    def load(device: torch.device) -> tuple[LLaMA, Tokenizer, dict[str | None, str]]:
        base = checkpoint_dir or base_folder(adapter_path or lora_path[0])
        tokenizer, model = Tokenizer(base), load_model(base, device, inference_dtype(precision))
        if adapter_path:
            load_adapter(model, adapter_path)
        else:
            hold_loras(model, lora_path)
        templates = {str(path): template or training_template(path) or "alpaca" for path in lora_path}
        own = (training_template(adapter_path) or "alpaca") if adapter_path else checkpoint_template(base)
        templates[None] = template or own or ("chat" if tokenizer.chat_template else "none")
        return model, tokenizer, templates

    chat(load, **flags)


if __name__ == "__main__":
    run(main)
