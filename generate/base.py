"""Answer a prompt with a model as it is. Guide: howto/inference.md"""

from pathlib import Path

from lit_llama import Tokenizer, load_model
from lit_llama.cli import run
from lit_llama.distributed import inference_dtype
from lit_llama.generation import Sampling, answer, default_device


def main(
    prompt: str,
    input: str = "",
    checkpoint_dir: Path = Path("checkpoints/meta-llama/Llama-2-7b-hf"),
    template: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float = 1.0,
    seed: int = 1234,
    precision: str = "bf16-true",
) -> None:
    """Answer a prompt with a model as it is. Guide: howto/inference.md

    Args:
        prompt: the instruction, or with --template none the text to go on from.
        input: context for the instruction.
        checkpoint_dir: the model folder.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none; default: chat where there is one.
        num_samples: how many answers.
        max_new_tokens: longest answer in tokens.
        temperature: randomness; 0 takes the most likely token each time.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the most likely tokens that make up this probability.
        seed: of the sampling.
        precision: bf16-true or 32-true.
    """
    tokenizer = Tokenizer(checkpoint_dir)
    model = load_model(checkpoint_dir, default_device(), inference_dtype(precision))
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    template = template or ("chat" if tokenizer.chat_template else "none")
    answer(model, tokenizer, prompt, input, template, num_samples, sampling)


if __name__ == "__main__":
    run(main)
