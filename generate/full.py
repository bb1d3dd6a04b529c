"""Answer a prompt with a finetuned model. Guide: howto/inference.md"""

from pathlib import Path

from answering import AnswerArgs, Precision, answer, load_device, read_prompts

from lit_llama.runtime.cli import run


def main(
    args: AnswerArgs = AnswerArgs(),
    checkpoint_dir: Path = Path("out/full/alpaca"),
    template: str | None = None,
    precision: Precision = "auto",
) -> None:
    """Answer a prompt with a model that finetune/full.py has trained. Guide: howto/inference.md

    Args:
        checkpoint_dir: Folder that finetune/full.py has written.
        template: Prompt template: alpaca, chatml, llama3, chat (the model folder's own) or none
            (default: that of the training, else alpaca).
        precision: Dtype of the model; auto: the faster one.
    """
    # imported after the flags are read: --help must not wait for torch
    from lit_llama.fast.decoding import optimize_for_inference
    from lit_llama.runtime.hardware import default_device, inference_dtype
    from lit_llama.storage.methods import load_finetuned, training_template

    prompts = read_prompts(args)
    dtype = inference_dtype(precision, checkpoint_dir)
    model, tokenizer, _ = load_finetuned(checkpoint_dir, None, load_device(args), dtype)
    optimize_for_inference(model, default_device(), args.quantize, args.fast_paths, args.compile)
    template = template or training_template(checkpoint_dir) or "alpaca"
    answer(model, tokenizer, template, prompts, args)


if __name__ == "__main__":
    run(main)
