"""Chat with a model, with a LoRA or several, or with an adapter. Guide: howto/inference.md"""

from pathlib import Path

from lit_llama import Tokenizer, UserError, load_model
from lit_llama.adapter import load_adapter
from lit_llama.chat import Chat, converse
from lit_llama.checkpoint import checkpoint_template
from lit_llama.cli import run
from lit_llama.decoding import prepare
from lit_llama.distributed import inference_dtype
from lit_llama.generation import Sampling, default_device
from lit_llama.many_loras import add_lora, hold_loras
from lit_llama.methods import base_folder, training_template
from lit_llama.quantize import FOR_DECODING, quantization


def main(
    checkpoint_dir: Path | None = None,
    lora_path: list[Path] = [],  # noqa: B006, never changed
    adapter_path: Path | None = None,
    template: str | None = None,
    system: str | None = None,
    context: int = 4096,
    max_new_tokens: int = 512,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float = 1.0,
    seed: int = 1234,
    quantize: str | None = None,
    precision: str = "bf16-true",
) -> None:
    """Chat in the terminal. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends. Guide: howto/inference.md

    Example:
        python generate/chat.py --lora_path out/lora/alpaca
        python generate/chat.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --system "Be brief."

    Args:
        checkpoint_dir: the model folder; default: the base that the LoRA or adapter names.
        lora_path: a LoRA's folder, may be given several times; the first one answers, /lora changes to another.
        adapter_path: an adapter's folder, of either version.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none; default: the training's.
        system: a system message to begin with.
        context: tokens of the conversation that are kept; the oldest turns go first.
        max_new_tokens: longest answer in tokens.
        temperature: randomness; 0 takes the most likely token each time.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the most likely tokens that make up this probability.
        seed: of the sampling.
        quantize: int8 or int4 weights: faster, and a half or a quarter of the memory.
        precision: what the model computes in: bf16-true or 32-true.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    dtype, device = inference_dtype(precision), default_device()
    if quantize is not None:
        quantization(quantize, FOR_DECODING)
    folders = [*lora_path, *([adapter_path] if adapter_path else [])]
    if checkpoint_dir is None and not folders:
        raise UserError("--checkpoint_dir, --lora_path, --adapter_path: give the model to chat with")
    base = checkpoint_dir or base_folder(folders[0])
    tokenizer = Tokenizer(base)
    model = load_model(base, device if quantize is None else "cpu", dtype)
    own = template or (training_template(adapter_path) if adapter_path else checkpoint_template(base))
    if adapter_path:
        load_adapter(model, adapter_path)
    hold_loras(model)
    templates = {}
    for path in lora_path:
        add_lora(model, str(path), path)
        templates[str(path)] = template or training_template(path) or "alpaca"
    templates[None] = own or ("alpaca" if adapter_path else "chat" if tokenizer.chat_template else "none")
    prepare(model, device, quantize)
    converse(Chat(model, tokenizer, templates, sampling, system, context))


if __name__ == "__main__":
    run(main)
