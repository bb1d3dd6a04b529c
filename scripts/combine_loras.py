"""Make one LoRA out of several: their weighted sum. Guide: howto/many_loras.md"""

import math
from pathlib import Path

from lit_llama import LLaMAConfig, UserError
from lit_llama.cli import run
from lit_llama.files import check_new_folder, replacing
from lit_llama.lora import combine_loras, save_lora
from lit_llama.methods import base_folder, training_template


def main(
    lora_path: list[Path], out_dir: Path, weights: list[float] | None = None, checkpoint_dir: Path | None = None
) -> None:
    """Write the weighted sum of several LoRAs of one model as one LoRA, in the PEFT format; ranks add up.

    Guide: howto/many_loras.md

    Example:
        python scripts/combine_loras.py --lora_path out/lora/alice --lora_path out/lora/bob --out_dir out/lora/both

    Args:
        lora_path: the LoRAs' folders, ours or PEFT's: give the flag once for each.
        out_dir: where the new LoRA goes; must not exist.
        weights: one for each LoRA, in their order, such as [0.7,0.3]; default: 1 for all.
        checkpoint_dir: the base model's folder; default: the one that the first LoRA names.
    """
    check_new_folder(out_dir)
    weights = [1.0] * len(lora_path) if weights is None else weights
    if not lora_path or len(weights) != len(lora_path):
        raise UserError(f"--weights: {len(weights)} for {len(lora_path)} of --lora_path. Give one for each")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"--weights {weights}: should be numbers that are finite")
    base = checkpoint_dir or base_folder(lora_path[0])
    config, tensors = combine_loras(lora_path, weights, LLaMAConfig.from_checkpoint(base))
    templates = {training_template(path) for path in lora_path}
    if len(templates) > 1:
        print("trained with different prompt templates: give --template to generate/lora.py")
    with replacing(out_dir) as folder:
        save_lora(tensors, folder, config, str(base), templates.pop() or "" if len(templates) == 1 else "")
    print(f"LoRA of rank {config.r} in {out_dir}")


if __name__ == "__main__":
    run(main)
