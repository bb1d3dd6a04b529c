"""Answer a prompt with a LLaMA-Adapter. Guide: howto/inference.md"""

from pathlib import Path

from answering import AnswerArgs, Precision, answer, load_device, read_prompts

from lit_llama.runtime.cli import run


def main(
    args: AnswerArgs = AnswerArgs(),
    adapter_path: Path = Path("out/adapter/alpaca"),
    checkpoint_dir: Path | None = None,
    template: str | None = None,
    precision: Precision = "auto",
) -> None:
    """Answer a prompt with a LLaMA-Adapter. Guide: howto/inference.md

    Args:
        adapter_path: Folder of the adapter.
        checkpoint_dir: Folder of the base model (default: the one that the adapter names).
        template: Prompt template: alpaca, chatml, llama3, chat (the model folder's own) or none
            (default: that of the training, else alpaca).
        precision: Dtype of the model; auto: the faster one.
    """
    # imported after the flags are read: --help must not wait for torch
    from lit_llama.fast.decoding import optimize_for_inference
    from lit_llama.runtime.hardware import default_device, inference_dtype
    from lit_llama.storage.methods import load_finetuned, resolve_model_dir

    prompts = read_prompts(args)
    base = resolve_model_dir(adapter_path, checkpoint_dir)
    where = (adapter_path, base, load_device(args), inference_dtype(precision, base))
    model, tokenizer, template = load_finetuned(*where, template)
    optimize_for_inference(model, default_device(), args.quantize, args.fast_paths, args.compile)
    answer(model, tokenizer, template, prompts, args)


if __name__ == "__main__":
    run(main)
