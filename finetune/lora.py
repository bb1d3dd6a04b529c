"""Finetune a LLaMA with LoRA, and with an adapter beside it if asked for. Guide: howto/finetune_lora.md"""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from lit_llama import LLaMA
from lit_llama.adapter import AdapterConfig, apply_adapter, save_adapter
from lit_llama.cli import run
from lit_llama.lora import LoRAConfig, apply_lora, save_lora
from lit_llama.run import Run
from lit_llama.training import TrainArgs, fit


def main(
    out_dir: Path = Path("out/lora/alpaca"),
    lora: LoRAConfig = LoRAConfig(),
    adapter: AdapterConfig | None = None,
    train: TrainArgs = TrainArgs(),
    **flags,
) -> None:
    """Finetune a LLaMA with LoRA on a prepared set. Guide: howto/finetune_lora.md

    Example:
        python finetune/lora.py --config finetune/configs/lora-7b-24gb.yaml
        python finetune/lora.py --lora.targets all-linear --lora.r 16 --devices 4

    Args:
        out_dir: where the LoRA, metrics.csv and checkpoints go.
        lora: the method.
        adapter: a LLaMA-Adapter beside it, if one of these flags is given.
        train: the recipe.
    """
    job = Run(out_dir=out_dir, **flags)
    base = str(job.checkpoint_dir)

    def apply(model: LLaMA) -> None:
        apply_lora(model, lora)
        if adapter is not None:
            apply_adapter(model, adapter)

    def save(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        whole = dict(tensors)
        save_lora(whole, folder, lora, base, job.template)
        if adapter is not None:
            save_adapter(whole, folder / "adapter", adapter, model.module, base, job.template)

    model = job.build(apply)
    fit(job, model, train, save, lora.learning_rate_ratio)


if __name__ == "__main__":
    run(main)
