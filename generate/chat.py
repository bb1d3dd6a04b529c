"""Chat with a model, with a LoRA or several, or with an adapter. Guide: howto/inference.md"""

from pathlib import Path
from typing import Literal

from answering import Precision, TopP
from jsonargparse.typing import NonNegativeFloat, PositiveInt

from lit_llama.errors import UserError
from lit_llama.runtime.cli import run


def main(
    checkpoint_dir: Path | None = None,
    lora_path: list[Path] = [],  # noqa: B006, never changed
    adapter_path: Path | None = None,
    template: str | None = None,
    precision: Precision = "auto",
    system: str | None = None,
    context: PositiveInt = 4096,
    max_new_tokens: PositiveInt = 512,
    temperature: NonNegativeFloat = 0.8,
    top_k: PositiveInt | None = 200,
    top_p: TopP = 1.0,
    seed: int = 1234,
    quantize: Literal["int8", "int4"] | None = None,
) -> None:
    """Chat in the terminal until Ctrl-D. Ctrl-C stops an answer. Guide: howto/inference.md

    /help lists the commands, such as /reset, /input, /lora and /save.

    Example:
        python generate/chat.py --lora_path out/lora/alpaca
        python generate/chat.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --temperature 0

    Args:
        checkpoint_dir: Model folder (default: the base that the LoRA or adapter names).
        lora_path: Folder of a LoRA; with several, the first answers and /lora switches.
        adapter_path: Folder of an adapter of either version; not with --lora_path.
        template: Prompt template: alpaca, chatml, llama3, chat (the folder's own) or none
            (default: that of the training, else chat if there is one).
        precision: Dtype of the model; auto: the faster one.
        system: System message to start with.
        context: Maximum tokens of the conversation; the oldest turns are forgotten first.
        max_new_tokens: Maximum length of an answer in tokens.
        temperature: Sampling temperature; 0 is greedy decoding.
        top_k: Sample from the k most likely tokens only.
        top_p: Sample from the most likely tokens that make up this probability.
        seed: Sampling seed.
        quantize: Quantize the weights: faster, and a half or a quarter of the memory.
    """
    if not (checkpoint_dir or lora_path or adapter_path) or (lora_path and adapter_path):
        flags = "--checkpoint_dir, --lora_path, --adapter_path"
        raise UserError(f"{flags}: give a model, LoRAs or an adapter to chat with")
    # imported after the flags are read: --help must not wait for torch
    from conversation import Chat, converse

    from lit_llama.fast.decoding import optimize_for_inference
    from lit_llama.generation import Sampling
    from lit_llama.multi_lora import enable_multi_lora
    from lit_llama.runtime.hardware import default_device, inference_dtype
    from lit_llama.storage.methods import common_model_dir, load_finetuned, prompt_format

    base = common_model_dir([adapter_path] if adapter_path else lora_path, checkpoint_dir)
    device, dtype = default_device(), inference_dtype(precision, base)
    # weights to be quantized go to the GPU only afterwards
    load_device = "cpu" if quantize else device
    path = adapter_path or base
    model, tokenizer, own = load_finetuned(path, base, load_device, dtype, template)
    if adapter_path is None:
        enable_multi_lora(model, lora_path)
    optimize_for_inference(model, device, quantize)
    templates = {str(lora): prompt_format(lora, base, template) for lora in lora_path}
    templates[None] = own
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    converse(Chat(model, tokenizer, templates, sampling, system, context, template))


if __name__ == "__main__":
    run(main)
