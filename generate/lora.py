"""Answer a prompt with a LoRA, or with several side by side. Guide: howto/inference.md"""

from pathlib import Path

from answering import AnswerArgs, Precision, answer, load_device, read_prompts

from lit_llama.errors import UserError
from lit_llama.runtime.cli import run


def main(
    args: AnswerArgs = AnswerArgs(),
    lora_path: list[Path] = [Path("out/lora/alpaca")],  # noqa: B006, never changed
    checkpoint_dir: Path | None = None,
    template: str | None = None,
    precision: Precision = "auto",
) -> None:
    """Answer a prompt with a LoRA, or with several side by side. Guide: howto/inference.md

    Example:
        python generate/lora.py --lora_path out/lora/alpaca --prompt "Recommend a movie."
        python generate/lora.py --lora_path out/lora/alice --lora_path out/lora/bob --prompt "Hi."

    Args:
        lora_path: Folder of the LoRA, ours or PEFT's; an adapter trained with it is used too. With
            several folders each LoRA answers, and all share one base model in memory.
        checkpoint_dir: Folder of the base model (default: the one that the LoRA names).
        template: Prompt template: alpaca, chatml, llama3, chat (the folder's own) or none
            (default: that of the training, else chat if there is one, else alpaca).
        precision: Dtype of the model; auto: the faster one.
    """
    # imported after the flags are read: --help must not wait for torch
    from lit_llama.fast.decoding import optimize_for_inference
    from lit_llama.multi_lora import enable_multi_lora
    from lit_llama.runtime.hardware import default_device, inference_dtype
    from lit_llama.storage.methods import common_model_dir, load_finetuned, prompt_format

    if len(set(lora_path)) < max(len(lora_path), 1):
        raise UserError("--lora_path: should be one folder or several different ones")
    prompts = read_prompts(args)
    base = common_model_dir(lora_path, checkpoint_dir)
    device, dtype = load_device(args), inference_dtype(precision, base)
    if len(lora_path) == 1:
        model, tokenizer, templates = load_finetuned(lora_path[0], base, device, dtype, template)
    else:
        model, tokenizer, _ = load_finetuned(base, base, device, dtype)
        enable_multi_lora(model, lora_path)
        templates = {str(path): prompt_format(path, base, template) for path in lora_path}
    optimize_for_inference(model, default_device(), args.quantize, args.fast_paths, args.compile)
    answer(model, tokenizer, templates, prompts, args)


if __name__ == "__main__":
    run(main)
