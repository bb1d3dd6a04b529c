"""What memory a finetuning run takes, before it starts:  python scripts/estimate_memory.py --model 7B --method lora

A step runs on tensors that have shapes and no memory (FakeTensorMode), while every storage that comes and goes is
counted: the numbers are those of the code that trains, not of a formula beside it. What a kernel uses within itself,
and what the allocator loses between tensors, is not in them.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lit_llama.model
from lit_llama import LLaMA, LLaMAConfig, UserError
from lit_llama.adapter import AdapterConfig, apply_adapter, apply_adapter_v2
from lit_llama.attention import SampleLengths
from lit_llama.cli import run
from lit_llama.distributed import PRECISIONS, peak_memory_bytes
from lit_llama.dropout import token_rows
from lit_llama.lora import LoRAConfig, apply_lora
from lit_llama.methods import base_linears, replace_module
from lit_llama.model import recompute
from lit_llama.quantize import FOR_TRAINING, quantization


def main(
    model: str = "7B",
    method: str = "lora",
    devices: int = 1,
    precision: str = "bf16-mixed",
    quantize: str | None = None,
    micro_batch_tokens: int = 2048,
    sample_tokens: int = 150,
    activation_checkpointing: bool = False,
    lora: LoRAConfig = LoRAConfig(),
    adapter: AdapterConfig = AdapterConfig(),
    device: str = "cuda",
) -> None:
    """Print the memory of a finetuning run on each device: weights, gradients, optimizer, activations.

    Guide: howto/performance.md

    Example:
        python scripts/estimate_memory.py --model 7B --method lora --quantize nf4

    Args:
        model: an architecture by name (7B, Llama-3.2-1B, ...) or a model folder.
        method: lora, adapter, adapter_v2 or full.
        devices: over how many devices all parameters are sharded.
        precision: bf16-mixed, bf16-true or 32-true, as in finetune/*.py.
        quantize: nf4 or fp8, as in finetune/*.py.
        micro_batch_tokens: as --train.micro_batch_tokens of finetune/*.py.
        sample_tokens: tokens of a typical sample; what attention keeps depends on it on the CPU.
        activation_checkpointing: as --train.activation_checkpointing of finetune/*.py.
        lora: of the method lora.
        adapter: of the methods adapter and adapter_v2.
        device: cuda or cpu.
    """
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device {device}: unknown. Known: cuda, cpu")
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: unknown. Known: {', '.join(PRECISIONS)}")
    if not 1 <= min(devices, micro_batch_tokens, sample_tokens) <= max(devices, micro_batch_tokens) <= 10**6:
        bounds = "should be at least 1, and the first two at most a million"
        raise UserError(f"--devices, --micro_batch_tokens, --sample_tokens: {bounds}")
    apply = {
        "lora": lambda model: apply_lora(model, lora),
        "adapter": lambda model: apply_adapter(model, adapter),
        "adapter_v2": lambda model: apply_adapter_v2(model, adapter),
        "full": lambda model: (model if precision != "bf16-mixed" else model.float()).requires_grad_(True),
    }.get(method)
    if apply is None:
        raise UserError(f"--method {method}: unknown. Known: lora, adapter, adapter_v2, full")
    config = LLaMAConfig.from_checkpoint(model) if Path(model).is_dir() else LLaMAConfig.from_name(model)
    with torch.device("meta"):
        llama = LLaMA(config).to(PRECISIONS[precision]).requires_grad_(False)
    apply(llama)
    lengths = [min(sample_tokens, micro_batch_tokens)] * max(1, micro_batch_tokens // sample_tokens)
    with FakeTensorMode():
        give_fake_memory(llama)
        if quantize is not None:
            quantize_frozen(llama, quantize)
        trained = sum(p.nbytes for p in llama.parameters() if p.requires_grad)
        weights = sum(t.nbytes for t in (*llama.parameters(), *llama.buffers()))
        sizes = {"weights": weights, "gradients": trained, "optimizer": 2 * trained}
        if devices > 1:
            sizes = {name: size // devices for name, size in sizes.items()}
            sizes["whole weights meanwhile"] = gathered_bytes(llama)
        if device == "cuda":
            lit_llama.model.causal_attention = flash_attention
        sizes["activations"] = activation_bytes(llama, lengths, precision, activation_checkpointing)
    if device == "cpu":  # what a run's process holds beside its tensors: this one holds the same libraries
        sizes["Python and torch"] = peak_memory_bytes(torch.device("cpu"))
        sizes["kernels, allocator"] = int(KERNELS + ALLOCATOR_LOSS * sizes["activations"])
    print(f"{model}, {method}, {sum(lengths):,} tokens a micro-batch, on each of {devices} {device} device(s):")
    for name, size in (sizes | {"total": sum(sizes.values())}).items():
        print(f"{name:<24}{size / 1e9:>8.3f} GB")


KERNELS, ALLOCATOR_LOSS = 350e6, 0.25
"""An allowance for the CPU: bytes of oneDNN's compiled kernels and buffers; what malloc loses, a share of activations.
Fitted to the runs in howto/performance.md. On a GPU torch's own count of what is allocated has neither."""


def give_fake_memory(model: LLaMA) -> None:
    """Parameters that are on the CPU as far as code can tell, inside a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(tensor, parameter.requires_grad))


def flash_attention(query: Tensor, key: Tensor, value: Tensor, samples: SampleLengths) -> Tensor:
    """What `causal_attention` is on a GPU, by the CPU's flash kernel, which keeps the same for the way back."""
    groups = query.size(1) // key.size(1)
    key, value = (t if groups == 1 else t.repeat_interleave(groups, dim=1) for t in (key, value))
    query, key, value = (samples.split(t) for t in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return attended.transpose(1, 2).flatten(0, 1)


def quantize_frozen(model: LLaMA, quantize: str) -> None:
    """As `load_weights` does: all frozen linear layers but the head."""
    kind = quantization(quantize, FOR_TRAINING)
    for name, linear in base_linears(model).items():
        if linear is not model.lm_head and not linear.weight.requires_grad:
            replace_module(model, name, kind(linear.weight, linear.bias))


def gathered_bytes(model: LLaMA) -> int:
    """What `shard` makes whole on every device: a block, the one that comes next, and all that is in no block."""
    block = sum(p.nbytes for p in model.layers[-1].parameters())
    return sum(p.nbytes for p in model.parameters()) - (len(model.layers) - 2) * block


def activation_bytes(model: LLaMA, lengths: list[int], precision: str, activation_checkpointing: bool) -> int:
    """What a micro-batch has in memory at most, forward and back, beside weights and gradients.

    The largest of two micro-batches: the first one also makes what is kept for all.
    """
    if activation_checkpointing:
        for layer in model.layers:
            layer.forward = partial(recompute, layer.forward, preserve_rng_state=True)
    count, device = sum(lengths), model.embed_tokens.weight.device
    ids = torch.zeros(count, dtype=torch.long)
    trained = [p for p in model.train().parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with Counter() as counter:
        for _ in range(2):
            autocast = nullcontext()
            if precision == "bf16-mixed":
                autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
            with token_rows(0, 0, list(range(len(lengths))), lengths, device):
                with autocast:
                    loss = model(input_ids=ids, lengths=lengths, positions=torch.arange(count), labels=ids)
                loss.backward()
            del loss
    return counter.peak


class Counter(TorchDispatchMode):
    """Bytes of all storages that came to be inside the block: those that are `live`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        result = function(*args, **(kwargs or {}))
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in before:
                self.note(storage)
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known[storage] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.live -= size


if __name__ == "__main__":
    run(main)
