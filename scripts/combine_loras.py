"""Make one LoRA out of several: their weighted sum. Guide: howto/many_loras.md"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_llama import LLaMA, UserError
from lit_llama.lora import LoRAConfig
from lit_llama.runtime.cli import run
from lit_llama.storage.files import atomic_write, require_empty_dir
from lit_llama.storage.loras import read_linear_lora, warn_of_other_format
from lit_llama.storage.methods import common_model_dir, training_template
from lit_llama.storage.model_folder import model_config
from lit_llama.storage.peft import save_lora, target_names


def main(
    lora_path: list[Path],
    out_dir: Path,
    weights: list[float] | None = None,
    checkpoint_dir: Path | None = None,
) -> None:
    """Write the weighted sum of several LoRAs as one LoRA in the PEFT format; ranks add up.

    Guide: howto/many_loras.md

    Example:
        python scripts/combine_loras.py --lora_path out/lora/a --lora_path out/lora/b --out_dir c

    Args:
        lora_path: Folders of the LoRAs, ours or PEFT's; repeat the flag.
        out_dir: Output folder; must not exist.
        weights: One per LoRA, in their order, such as [0.7,0.3]; default: 1 for all.
        checkpoint_dir: Folder of the base model; default: the one that the LoRAs name.
    """
    require_empty_dir(out_dir)
    weights = [1.0] * len(lora_path) if weights is None else weights
    if not lora_path or len(weights) != len(lora_path):
        problem = f"{len(weights)} for {len(lora_path)} of --lora_path"
        raise UserError(f"--weights: {problem}. Pass one for each")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"--weights {weights}: should be finite numbers")
    base = common_model_dir(lora_path, checkpoint_dir)
    for path in lora_path:
        warn_of_other_format(path, base)
    config, tensors = combine_loras(lora_path, weights, base)
    templates = {training_template(path) for path in lora_path}
    if len(templates) > 1:
        print("trained with different prompt templates: pass --template to generate/lora.py")
    template = templates.pop() or "" if len(templates) == 1 else ""
    with atomic_write(out_dir) as folder:
        folder.mkdir()
        save_lora(tensors, folder, config, str(base), template)
    print(f"LoRA of rank {config.r} in {out_dir}")


def combine_loras(
    paths: Sequence[Path], weights: Sequence[float], checkpoint_dir: Path
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Return the weighted sum of saved LoRAs of one model as one LoRA, for `save_lora`.

    It is exact: A are theirs stacked, B theirs side by side, each times weight and scaling. Raises
    UserError for DoRA, whose updates do not add up, and for changes of more than linear layers.
    """
    all_a: dict[str, list[Tensor]] = {}  # by layer
    all_b: dict[str, list[Tensor]] = {}
    for path, weight in zip(paths, weights, strict=True):
        saved = read_linear_lora(path, checkpoint_dir)
        if saved.config.use_dora:
            hint = "Merge it into its base: scripts/merge_lora.py"
            raise UserError(f"{path}: is a DoRA, whose updates do not add up. {hint}")
        for name, lora in saved.layers.items():
            all_a.setdefault(name, []).append(lora.a.float())
            all_b.setdefault(name, []).append(weight * lora.scaling * lora.b.float())
    tensors = {f"{name}.lora_A.weight": torch.cat(parts) for name, parts in all_a.items()}
    r = max(len(a) for a in tensors.values())
    tensors |= {f"{name}.lora_B.weight": torch.cat(parts, dim=1) for name, parts in all_b.items()}
    with torch.device("meta"):
        known = [name for name, _ in LLaMA(model_config(checkpoint_dir)).named_parameters()]
    targets = target_names(all_a, known)
    return LoRAConfig(r=r, alpha=r, dropout=0, targets=targets), tensors


if __name__ == "__main__":
    run(main)
