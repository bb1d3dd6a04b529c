"""Finetune all weights of a LLaMA. Guide: howto/finetune_full.md"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lit_llama import LLaMA
from lit_llama.checkpoint import tokenizer_files, write_checkpoint
from lit_llama.cli import run
from lit_llama.run import Run
from lit_llama.training import TrainArgs, fit


def main(
    out_dir: Path = Path("out/full/alpaca"),
    train: TrainArgs = TrainArgs(learning_rate=3e-5),
    precision: str = "bf16-mixed",
    **flags,
) -> None:
    """Finetune all weights of a LLaMA on a prepared set. Guide: howto/finetune_full.md

    Example:
        python finetune/full.py --config finetune/configs/full-7b-4-devices.yaml

    Args:
        out_dir: where the model folder, metrics.csv and checkpoints go.
        train: the recipe.
        precision: bf16-mixed (fp32 weights train), bf16-true (bf16 ones train) or 32-true.
    """
    job = Run(out_dir=out_dir, precision=precision, **flags)

    def apply(model: LLaMA) -> None:
        model.requires_grad_(True)
        if precision == "bf16-mixed":
            model.float()  # these are the weights that train; bf16 copies of them compute

    def save(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        dtype = torch.float32 if precision == "32-true" else torch.bfloat16
        rounded = ((name, tensor.to(dtype)) for name, tensor in tensors)
        write_checkpoint(folder, model.module.config, rounded, tokenizer_files(job.checkpoint_dir), job.template)

    model = job.build(apply)
    fit(job, model, train, save)


if __name__ == "__main__":
    run(main)
