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
) -> None:
    """Finetune a LLaMA with LoRA on a tokenized dataset. Guide: howto/finetune_lora.md

    Example:
        python finetune/lora.py --config finetune/configs/lora-7b-24gb.yaml
        python finetune/lora.py --lora.targets all-linear --lora.r 16 --devices 4

    Args:
        args: Devices, data and folders.
        lora: LoRA.
        adapter: LLaMA-Adapter beside it, if one of these flags is given.
        train: Training recipe.
    """
    # torch is imported only now, after the flags are read, so that --help is fast
    import torch

    from lit_llama.adapter import apply_adapter
    from lit_llama.fast import use_fast_paths
    from lit_llama.lora import apply_lora
    from lit_llama.runtime.devices import PRECISIONS, setup_fabric, setup_model
    from lit_llama.runtime.loggers import check_logger
    from lit_llama.storage.datasets import load_dataset
    from lit_llama.storage.model_folder import empty_model
    from lit_llama.storage.run_folder import check_run_folder
    from lit_llama.training import fit

    flags = args.as_flags(lora=lora, adapter=adapter, train=train)
    check_run_folder(args.out_dir, args.resume, flags)
    check_logger(args.logger)
    fabric = setup_fabric(args.devices, args.num_nodes, args.precision)
    torch.manual_seed(args.seed)
    dataset = load_dataset(args.data_dir, args.checkpoint_dir)
    model = empty_model(args.checkpoint_dir, PRECISIONS[args.precision])
    apply_lora(model, lora)
    methods = {"LORA": lora}
    if adapter is not None:
        apply_adapter(model, adapter)
        methods["llama_adapter"] = adapter
    if train.fast_paths:
        use_fast_paths(model)
    model = setup_model(fabric, model, args.checkpoint_dir, args.quantize)
    fit(fabric, model, dataset, methods, train, args, flags)


if __name__ == "__main__":
    run(main)
