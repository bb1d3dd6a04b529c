"""Count the memory, the memory traffic and the kernels of a training step on a GPU, without one.

    python benchmarks/count.py

The step runs on tensors that have shapes but no memory, as in scripts/estimate_memory.py. Traffic
is what operations other than matmuls read and write; an operation counts as one kernel.
"""

from typing import Any

import common
import torch

from lit_llama import LLaMA, LLaMAConfig
from lit_llama.args import AdapterConfig, LoRAConfig
from lit_llama.fast import optimize_for_training
from lit_llama.runtime.cli import run
from lit_llama.runtime.memory import Counter, estimate_memory
from lit_llama.storage.methods import METHODS, FullConfig

MATMULS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_mm")
NO_KERNEL = ("empty", "new_empty", "detach", "alias", "_local_scalar_dense", "device")
GATHERS = ("index_select", "embedding", "index")
DORA = LoRAConfig(use_dora=True)
# Name: a method of the table, its settings, --quantize and --precision.
CASES: dict[str, tuple[str, Any, str | None, str]] = {
    "lora": ("LORA", LoRAConfig(), None, "bf16-mixed"),
    "lora --lora.use_dora true": ("LORA", DORA, None, "bf16-mixed"),
    "lora --quantize nf4": ("LORA", LoRAConfig(), "nf4", "bf16-mixed"),
    "lora --quantize fp8": ("LORA", LoRAConfig(), "fp8", "bf16-mixed"),
    "adapter_v2": ("llama_adapter_v2", AdapterConfig(), None, "bf16-mixed"),
    "full --precision bf16-true": ("full", FullConfig("bf16-true"), None, "bf16-true"),
}


class TrafficCounter(Counter):
    """Count also kernels and the bytes that they read and write, by the name of the operation."""

    def start(self) -> None:
        self.kernels: dict[str, int] = {}
        self.traffic: dict[str, int] = {}

    def count(self, function: Any, args: Any, result: Any) -> list[torch.Tensor]:
        new = super().count(function, args, result)
        packet, changed = getattr(function, "overloadpacket", None), 0
        name = (packet or function).__name__
        inputs = self.tensors(args)
        if packet is not None:  # an operation that changes an input writes it too
            for argument, value in zip(function._schema.arguments, args[0], strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    changed += sum(tensor.nbytes for tensor in self.tensors(value))
        is_view = not new and not changed
        if is_view or name.startswith(NO_KERNEL) or all(t.numel() == 0 for t in inputs):
            return new
        written = sum(tensor.nbytes for tensor in new) + changed
        read = sum(tensor.nbytes for tensor in inputs)
        if name in GATHERS:  # not the whole table
            read = written
        elif name in ("masked", "masked_both"):  # a row of the table, of bools, for each token
            table, rows = args[-2:]
            read += rows.numel() * table.size(1) - table.nbytes
        self.kernels[name] = self.kernels.get(name, 0) + 1
        self.traffic[name] = self.traffic.get(name, 0) + read + written
        return new


def main(
    models: tuple[str, ...] = ("7B", "Llama-3-8B"),
    recompute: tuple[str, ...] = ("none", "activations", "block"),
    tokens: int = 2048,
    sample_tokens: int = 128,
) -> None:
    """Count what a training step on a GPU takes.

    Args:
        models: Architectures by name.
        recompute: Values of --train.recompute.
        tokens: Tokens of the micro-batch.
        sample_tokens: Tokens of each of its samples.
    """
    rows, figures = [], {}
    for model in models:
        for case in CASES:
            for level in recompute:
                name = f"{model} {case} --train.recompute {level}"
                figures[name] = counted = count(model, case, level, tokens, sample_tokens)
                sizes = [f"{counted[key] / 1e9:.2f} GB" for key in ("activations", "total")]
                traffic = f"{counted['traffic'] / 1e9:.0f} GB"
                rows.append([model, f"`{case}`", level, *sizes, traffic, str(counted["kernels"])])
                print(name, *rows[-1][3:], flush=True)
    header = ["model", "method", "recompute", "activations", "total", "traffic", "kernels"]
    setting = f"A micro-batch of {tokens} tokens, all of them labels."
    notes = [
        "traffic: what all but matmuls and attention read and write",
        "kernels: operations, matmuls included; each function of fast/kernels.py is one",
    ]
    title = "A training step on a GPU"
    common.save("count", title, setting, common.table(header, rows), notes, figures, "counted")


def count(model: str, case: str, level: str, tokens: int, sample_tokens: int) -> dict[str, int]:
    """Return bytes of memory and of traffic, and the number of kernels."""
    method, settings, quantize, precision = CASES[case]
    with torch.device("meta"):
        llama = LLaMA(LLaMAConfig.from_name(model)).to(torch.bfloat16).requires_grad_(False)
    METHODS[method].apply(llama, settings)
    optimize_for_training(llama, torch.device("cuda"), recompute=level)
    counter, lengths = TrafficCounter(), [sample_tokens] * (tokens // sample_tokens)
    sizes = estimate_memory(llama, lengths, precision, quantize, counter=counter)
    other = [n for name, n in counter.traffic.items() if name not in MATMULS and "attn" not in name]
    figures = dict(total=sum(sizes.values()), traffic=sum(other))
    return sizes | figures | dict(kernels=sum(counter.kernels.values()))


if __name__ == "__main__":
    run(main)
