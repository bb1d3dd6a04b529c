"""Answer a prompt with a LoRA, merged into its base. Guide: howto/inference.md"""

from pathlib import Path

from lit_llama import Tokenizer, load_model
from lit_llama.cli import run
from lit_llama.distributed import inference_dtype
from lit_llama.generation import Sampling, answer, default_device
from lit_llama.lora import load_lora, lora_base, lora_template, merge_lora


def main(
    prompt: str,
    input: str = "",
    lora_path: Path = Path("out/lora/alpaca"),
    checkpoint_dir: Path | None = None,
    template: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float = 1.0,
    seed: int = 1234,
    precision: str = "bf16-true",
) -> None:
    """Answer a prompt with a LoRA, merged into its base. Guide: howto/inference.md

    Args:
        prompt: the instruction, or with --template none the text to go on from.
        input: context for the instruction.
        lora_path: the LoRA's folder, ours or PEFT's.
        checkpoint_dir: the base model's folder; default: the one that the LoRA names.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none; default: the training's, else alpaca.
        num_samples: how many answers.
        max_new_tokens: longest answer in tokens.
        temperature: randomness; 0 takes the most likely token each time.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the most likely tokens that make up this probability.
        seed: of the sampling.
        precision: bf16-true or 32-true.
    """
    checkpoint_dir = checkpoint_dir or lora_base(lora_path)
    tokenizer = Tokenizer(checkpoint_dir)
    model = load_model(checkpoint_dir, default_device(), inference_dtype(precision))
    load_lora(model, lora_path)
    merge_lora(model)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    answer(model, tokenizer, prompt, input, template or lora_template(lora_path) or "alpaca", num_samples, sampling)


if __name__ == "__main__":
    run(main)
