"""Finetune a LLaMA with LoRA. Guide: howto/finetune_lora.md"""

from pathlib import Path

from lit_llama import load_model
from lit_llama.cli import run
from lit_llama.lora import LoRAConfig, apply_lora, save_lora
from lit_llama.training import Run, TrainArgs, fit


def main(
    checkpoint_dir: Path = Path("checkpoints/meta-llama/Llama-2-7b-hf"),
    data_dir: Path = Path("data/alpaca"),
    out_dir: Path = Path("out/lora/alpaca"),
    devices: int = 1,
    num_nodes: int = 1,
    precision: str = "bf16-mixed",
    seed: int = 1337,
    resume: bool = False,
    lora: LoRAConfig = LoRAConfig(),
    train: TrainArgs = TrainArgs(),
) -> None:
    """Finetune a LLaMA with LoRA on a prepared set. Guide: howto/finetune_lora.md

    Args:
        checkpoint_dir: the model folder.
        data_dir: the prepared set, from scripts/prepare_*.py.
        out_dir: where the LoRA, metrics.csv and checkpoints go.
        devices: how many devices to train on; only 1 is supported.
        num_nodes: how many machines; only 1 is supported.
        precision: bf16-mixed (frozen weights bf16, trained ones fp32) or 32-true.
        seed: of everything random: the LoRA's start, the samples' order, dropout.
        resume: go on from the newest checkpoint in out_dir.
        lora: the method.
        train: the recipe.
    """
    job = Run(
        checkpoint_dir=checkpoint_dir,
        data_dir=data_dir,
        out_dir=out_dir,
        devices=devices,
        num_nodes=num_nodes,
        precision=precision,
        seed=seed,
        resume=resume,
    )
    model = load_model(checkpoint_dir, job.fabric.device, job.weight_dtype)
    apply_lora(model, lora)
    fit(job, model, train, lambda folder: save_lora(model, folder, lora, str(checkpoint_dir), job.template))


if __name__ == "__main__":
    run(main)
