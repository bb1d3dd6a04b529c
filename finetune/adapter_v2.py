"""Finetune a LLaMA with LLaMA-Adapter v2. Guide: howto/finetune_adapter.md"""

from pathlib import Path

from lit_llama.args import AdapterConfig
from lit_llama.runtime.args import RunArgs, TrainArgs
from lit_llama.runtime.cli import run


def main(
    args: RunArgs = RunArgs(out_dir=Path("out/adapter_v2/alpaca")),
    adapter: AdapterConfig = AdapterConfig(),
    train: TrainArgs = TrainArgs(learning_rate=9e-3, weight_decay=0.02, warmup_epochs=2),
) -> None:
    """Finetune a LLaMA with LLaMA-Adapter v2 on a tokenized dataset.

    Guide: howto/finetune_adapter.md

    Args:
        args: Devices, data and folders.
        adapter: LLaMA-Adapter v2.
        train: Training recipe.
    """
    # torch is imported only now, after the flags are read, so that --help is fast
    import torch

    from lit_llama.adapter import apply_adapter_v2
    from lit_llama.fast import optimize_for_training
    from lit_llama.runtime.devices import check_memory, setup_fabric, setup_model
    from lit_llama.runtime.hardware import PRECISIONS
    from lit_llama.storage.datasets import load_dataset
    from lit_llama.storage.model_folder import empty_model
    from lit_llama.storage.run_folder import start_run
    from lit_llama.training import fit

    args, train, flags = start_run(args, train, adapter=adapter)
    fabric = setup_fabric(args.devices, args.num_nodes, args.precision)
    torch.manual_seed(args.seed)
    model = empty_model(args.checkpoint_dir, PRECISIONS[args.precision])
    dataset = load_dataset(args.data_dir, args.checkpoint_dir)
    apply_adapter_v2(model, adapter)
    methods = {"llama_adapter_v2": adapter}
    optimize_for_training(model, fabric.device, **train.model_options())
    check_memory(fabric, model, dataset, args, train)
    model = setup_model(fabric, model, args.checkpoint_dir, args.quantize)
    fit(fabric, model, dataset, methods, train, args, flags)


if __name__ == "__main__":
    run(main)
