"""Finetune a LLaMA with LLaMA-Adapter. Guide: howto/finetune_adapter.md"""

from pathlib import Path

from lit_llama.adapter import AdapterConfig, apply_adapter, save_adapter
from lit_llama.cli import run
from lit_llama.run import Run
from lit_llama.training import TrainArgs, fit


def main(
    out_dir: Path = Path("out/adapter/alpaca"),
    adapter: AdapterConfig = AdapterConfig(),
    train: TrainArgs = TrainArgs(learning_rate=9e-3, weight_decay=0.02, warmup_epochs=2),
    **flags,
) -> None:
    """Finetune a LLaMA with LLaMA-Adapter on a prepared set. Guide: howto/finetune_adapter.md

    Args:
        out_dir: where the adapter, metrics.csv and checkpoints go.
        adapter: the method.
        train: the recipe.
    """
    job = Run(out_dir=out_dir, **flags)
    model = job.build(lambda llama: apply_adapter(llama, adapter))
    base = str(job.checkpoint_dir)
    fit(
        *(job, model, train),
        lambda folder, tensors: save_adapter(dict(tensors), folder, adapter, model.module, base, job.template),
    )


if __name__ == "__main__":
    run(main)
