"""Finetune a LLaMA with LoRA, and an adapter beside it. Guide: howto/finetune_lora.md"""

from pathlib import Path

from lit_llama.args import AdapterConfig, LoRAConfig
from lit_llama.runtime.args import RunArgs, TrainArgs
from lit_llama.runtime.cli import run


def main(
    args: RunArgs = RunArgs(out_dir=Path("out/lora/alpaca")),
    lora: LoRAConfig = LoRAConfig(),
    adapter: AdapterConfig | None = None,
    train: TrainArgs = TrainArgs(),
    init_from: Path | None = None,
) -> None:
    """Finetune a LLaMA with LoRA on a tokenized dataset. Guide: howto/finetune_lora.md

    Example:
        python finetune/lora.py --lora.targets all-linear --lora.r 16 --devices 4

    Args:
        args: Devices, data and folders.
        lora: LoRA.
        adapter: LLaMA-Adapter beside it, if one of these flags is given.
        train: Training recipe.
        init_from: LoRA to continue on other data, ours or PEFT's; decides rank and targets.
    """
    import torch  # only now, after the flags are read, so that --help is fast

    from lit_llama.adapter import apply_adapter
    from lit_llama.fast import optimize_for_training
    from lit_llama.runtime.devices import check_memory, setup_fabric, setup_model
    from lit_llama.runtime.hardware import PRECISIONS
    from lit_llama.storage.datasets import load_dataset
    from lit_llama.storage.loras import init_lora, starting_config
    from lit_llama.storage.model_folder import empty_model
    from lit_llama.storage.run_folder import start_run
    from lit_llama.training import fit

    lora = starting_config(lora, init_from, args.checkpoint_dir)
    args, train, flags = start_run(args, train, lora=lora, adapter=adapter, init_from=init_from)
    fabric = setup_fabric(args.devices, args.num_nodes, args.precision)
    torch.manual_seed(args.seed)
    model = empty_model(args.checkpoint_dir, PRECISIONS[args.precision])
    dataset = load_dataset(args.data_dir, args.checkpoint_dir)
    init_lora(model, lora, init_from)
    methods = {"LORA": lora} | ({"llama_adapter": adapter} if adapter else {})
    if adapter is not None:
        apply_adapter(model, adapter)
    optimize_for_training(model, fabric.device, **train.model_options())
    check_memory(fabric, model, dataset, args, train)
    model = setup_model(fabric, model, args.checkpoint_dir, args.quantize)
    fit(fabric, model, dataset, methods, train, args, flags)


if __name__ == "__main__":
    run(main)
