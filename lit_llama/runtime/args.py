"""The flags that all finetuning scripts share. Importing this file does not load torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from lit_llama.args import BelowOne


@dataclass
class RunArgs:
    """Devices, data and folders of a finetuning run.

    Args:
        out_dir: Output folder: result, checkpoints.
        checkpoint_dir: Model folder.
        data_dir: Tokenized dataset of scripts/prepare_*.py.
        devices: Devices per machine.
        num_nodes: Machines.
        precision: bf16-mixed: frozen weights in bf16, trained ones in fp32. auto: the faster one.
        seed: Seed of initialization, sample order and dropout.
        resume: Resume from the latest checkpoint in out_dir.
        quantize: Quantize frozen weights: nf4 (least memory), fp8 (fastest).
        logger: Also log metrics to this service.
    """

    out_dir: Path
    checkpoint_dir: Path = Path("checkpoints/meta-llama/Llama-2-7b-hf")
    data_dir: Path = Path("data/alpaca")
    devices: PositiveInt = 1
    num_nodes: PositiveInt = 1
    precision: Literal["auto", "bf16-mixed", "bf16-true", "32-true"] = "auto"
    seed: int = 1337
    resume: bool = False
    quantize: Literal["nf4", "fp8"] | None = None
    logger: Literal["tensorboard", "wandb", "mlflow"] | None = None

    def as_flags(self, **groups: Any) -> dict[str, Any]:
        """Return all flags as plain values, as in config.yaml. `lora=LoRAConfig()` adds a group."""
        # JSON makes lists of tuples; dataclasses become groups, and paths text
        flags = json.dumps(vars(self) | groups, default=lambda x: getattr(x, "__dict__", str(x)))
        return json.loads(flags)


@dataclass
class TrainArgs:
    """Training recipe.

    Args:
        batch_size: Samples per optimizer step, over all devices.
        micro_batch_tokens: Tokens per forward pass; does not change results.
        recompute: Recompute in backward (GPU default: activations).
        fast_paths: Use the optimized modules of lit_llama/fast.
        kernels: CPU kernels (default: the faster ones, measured).
        epochs: Passes over the training set.
        max_steps: Stop after this many steps, regardless of epochs.
        learning_rate: Peak learning rate.
        schedule: Learning rate after warm-up.
        warmup_steps: Steps of linear warm-up, at most half of the run.
        warmup_epochs: Warm-up in epochs; replaces warmup_steps.
        weight_decay: AdamW's weight decay.
        beta1: AdamW's decay rate of the gradient mean.
        beta2: AdamW's decay rate of the squared gradient mean.
        max_grad_norm: Clip gradients to this norm; 0 turns clipping off.
        eval_interval: Steps between validations.
        eval_samples: Validate on this many samples (default: all).
        save_interval: Steps between checkpoints.
        keep_last: Checkpoints to keep, besides the best one.
        log_interval: Steps between log lines without a terminal.
    """

    batch_size: PositiveInt = 128
    micro_batch_tokens: PositiveInt = 2048
    recompute: Literal["none", "activations", "block"] | None = None
    fast_paths: bool = True
    kernels: list[Literal["packed", "short_attention"]] | None = None
    epochs: PositiveInt = 5
    max_steps: PositiveInt | None = None
    learning_rate: NonNegativeFloat = 3e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 100
    warmup_epochs: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat = 0.0
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999
    max_grad_norm: NonNegativeFloat = 1.0
    eval_interval: PositiveInt = 200
    eval_samples: PositiveInt | None = None
    save_interval: PositiveInt = 200
    keep_last: PositiveInt = 2
    log_interval: PositiveInt = 10

    def model_options(self) -> dict[str, Any]:
        """Return the arguments of `optimize_for_training`."""
        names = ("fast_paths", "recompute", "kernels")
        return {name: getattr(self, name) for name in names}
