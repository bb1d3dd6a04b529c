"""Estimate the memory of a finetuning run. Guide: howto/performance.md"""

from pathlib import Path
from typing import Literal

import torch
from jsonargparse.typing import PositiveInt

from lit_llama import LLaMA, LLaMAConfig, UserError
from lit_llama.args import AdapterConfig, LoRAConfig
from lit_llama.fast import optimize_for_training
from lit_llama.runtime.cli import run
from lit_llama.runtime.hardware import PRECISIONS, peak_memory_bytes
from lit_llama.runtime.memory import estimate_memory
from lit_llama.storage.methods import METHODS, FullConfig, Method
from lit_llama.storage.model_folder import model_config

# Allowance on the CPU: bytes of oneDNN's compiled kernels and buffers, and what malloc loses, as a
# share of the activations. Fitted to the runs in howto/performance.md. On a GPU, torch's own count
# of allocated memory includes neither.
KERNELS, ALLOCATOR_LOSS = 350e6, 0.25


def main(
    model: str = "7B",
    method: str = "lora",
    devices: PositiveInt = 1,
    precision: Literal["bf16-mixed", "bf16-true", "32-true"] = "bf16-mixed",
    quantize: Literal["nf4", "fp8"] | None = None,
    micro_batch_tokens: PositiveInt = 2048,
    sample_tokens: PositiveInt = 150,
    recompute: Literal["none", "activations", "block"] | None = None,
    lora: LoRAConfig = LoRAConfig(),
    adapter: AdapterConfig = AdapterConfig(),
    device: Literal["cuda", "cpu"] = "cuda",
) -> None:
    """Estimate the memory of a finetuning run per device: weights, optimizer, activations...

    Guide: howto/performance.md

    Example:
        python scripts/estimate_memory.py --model 7B --method lora --quantize nf4

    Args:
        model: Architecture by name (7B, Llama-3.2-1B, ...) or a model folder.
        method: lora, adapter, adapter_v2 or full.
        devices: Devices that all parameters are sharded over.
        precision: As in finetune/*.py.
        quantize: As in finetune/*.py.
        micro_batch_tokens: As --train.micro_batch_tokens of finetune/*.py.
        sample_tokens: Tokens of a typical sample, or of the longest one if that is longer than
            micro_batch_tokens: it is a micro-batch of its own.
        recompute: As --train.recompute of finetune/*.py.
        lora: LoRA.
        adapter: LLaMA-Adapter, v1 and v2.
        device: Kind of device.
    """
    chosen = find_method(method)
    settings = {LoRAConfig: lora, AdapterConfig: adapter, FullConfig: FullConfig(precision)}
    is_folder = Path(model).is_dir()
    config = model_config(model) if is_folder else LLaMAConfig.from_name(model)
    with torch.device("meta"):
        llama = LLaMA(config).to(PRECISIONS[precision]).requires_grad_(False)
    chosen.apply(llama, settings.get(chosen.config) or chosen.config())
    optimize_for_training(llama, torch.device(device), recompute=recompute)
    # as in training, a sample that is longer than a micro-batch is one of its own
    lengths = [sample_tokens] * max(1, micro_batch_tokens // sample_tokens)
    sizes = estimate_memory(llama, lengths, precision, quantize, devices, device)
    if device == "cpu":  # a run's process also holds the libraries, the same as this one
        sizes["Python and torch"] = peak_memory_bytes(torch.device("cpu"))
        sizes["kernels, allocator"] = int(KERNELS + ALLOCATOR_LOSS * sizes["activations"])
    count = f"{sum(lengths):,} tokens a micro-batch"
    print(f"{model}, {method}, {count}, on each of {devices} {device} device(s):")
    for name, size in (sizes | {"total": sum(sizes.values())}).items():
        print(f"{name:<24}{size / 1e9:>8.3f} GB")


def find_method(name: str) -> Method:
    """Return the method of that name in the table, or of that script in finetune/."""
    scripts = {method.script: method for method in METHODS.values()}
    if name not in METHODS | scripts:
        raise UserError(f"--method {name}: unknown. Known: {', '.join(scripts)}")
    return (METHODS | scripts)[name]


if __name__ == "__main__":
    run(main)
