"""Answer a prompt with a model as it is. Guide: howto/inference.md"""

from pathlib import Path

from answering import AnswerArgs, Precision, answer, load_device, read_prompts

from lit_llama.runtime.cli import run


def main(
    args: AnswerArgs = AnswerArgs(),
    checkpoint_dir: Path = Path("checkpoints/meta-llama/Llama-2-7b-hf"),
    template: str | None = None,
    precision: Precision = "auto",
) -> None:
    """Answer a prompt with a model as it is. Guide: howto/inference.md

    Args:
        checkpoint_dir: Model folder.
        template: Prompt template: alpaca, chatml, llama3, chat (the model folder's own) or none
            (default: chat if the folder has one, else none).
        precision: Dtype of the model; auto: the faster one.
    """
    # imported after the flags are read: --help must not wait for torch
    from lit_llama import Tokenizer, load_model
    from lit_llama.fast.decoding import optimize_for_inference
    from lit_llama.runtime.hardware import default_device, inference_dtype

    prompts = read_prompts(args)
    dtype = inference_dtype(precision, checkpoint_dir)
    model = load_model(checkpoint_dir, load_device(args), dtype)
    tokenizer = Tokenizer(checkpoint_dir)
    optimize_for_inference(model, default_device(), args.quantize, args.fast_paths, args.compile)
    template = template or ("chat" if tokenizer.chat_template else "none")
    answer(model, tokenizer, template, prompts, args)


if __name__ == "__main__":
    run(main)
