"""Estimate the memory of a finetuning run. Guide: howto/performance.md

A step runs on tensors that have shapes but no memory (FakeTensorMode), while every storage is
counted from its allocation to its release: the numbers are those of the code that trains, not of a
formula beside it. Workspaces inside kernels and fragmentation of the allocator are not included.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_llama import LLaMA, LLaMAConfig, UserError
from lit_llama.args import AdapterConfig, LoRAConfig
from lit_llama.dropout import token_rows
from lit_llama.fast import use_fast_paths
from lit_llama.fast.quantization import FOR_TRAINING, quantization
from lit_llama.model import Attention, Context
from lit_llama.runtime.cli import run
from lit_llama.runtime.devices import PRECISIONS, peak_memory_bytes
from lit_llama.storage.methods import METHODS, FullConfig, Method
from lit_llama.storage.model_folder import model_config
from lit_llama.training import checkpoint_blocks
from lit_llama.wrapping import base_linears

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
    activation_checkpointing: bool = False,
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
        activation_checkpointing: As --train.activation_checkpointing of finetune/*.py.
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
    use_fast_paths(llama)
    if activation_checkpointing:
        checkpoint_blocks(SimpleNamespace(module=llama))  # in a run, Fabric's wrapper holds it
    # as in training, a sample that is longer than a micro-batch is one of its own
    lengths = [sample_tokens] * max(1, micro_batch_tokens // sample_tokens)
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
            use_flash_attention(llama)
        sizes["activations"] = activation_bytes(llama, lengths, precision)
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


def give_fake_memory(model: LLaMA) -> None:
    """Move parameters from meta to the CPU, as code sees it inside a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(tensor, parameter.requires_grad))


def use_flash_attention(model: LLaMA) -> None:
    """Attend by the CPU's flash kernel, which saves the same for backward as that of a GPU."""

    def attend(query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        groups = query.size(1) // key.size(1)
        if groups > 1:
            key = key.repeat_interleave(groups, dim=1)
            value = value.repeat_interleave(groups, dim=1)
        shape = (-1, context.seqs.max_length)  # (tokens, ...) -> (samples, heads, seq, head_dim)
        query, key, value = (x.unflatten(0, shape).transpose(1, 2) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).flatten(0, 1)

    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend


def quantize_frozen(model: LLaMA, quantize: str) -> None:
    """Quantize all frozen linear layers but the head, as `load_weights` does."""
    kind = quantization(quantize, FOR_TRAINING)
    for name, linear in base_linears(model).items():
        if linear is not model.lm_head and not linear.weight.requires_grad:
            model.set_submodule(name, kind(linear.weight, linear.bias))


def gathered_bytes(model: LLaMA) -> int:
    """Bytes that every device gathers at once: a block, the next one, and all outside of blocks."""
    block = sum(p.nbytes for p in model.layers[-1].parameters())
    return sum(p.nbytes for p in model.parameters()) - (len(model.layers) - 2) * block


def activation_bytes(model: LLaMA, lengths: list[int], precision: str) -> int:
    """Peak memory of forward and backward of a micro-batch, beside weights and gradients.

    The larger one of two micro-batches: the first one also makes what all of them share.
    """
    count, device = sum(lengths), model.embed_tokens.weight.device
    ids = torch.zeros(count, dtype=torch.long)
    batch = dict(input_ids=ids, lengths=lengths, label_positions=torch.arange(count), labels=ids)
    for parameter in model.train().parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with Counter() as counter:
        for _ in range(2):
            autocast = nullcontext()
            if precision == "bf16-mixed":
                autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
            with token_rows(0, 0, list(range(len(lengths))), lengths, device):
                with autocast:
                    loss = model(**batch)
                loss.backward()
            del loss
    return counter.peak


class Counter(TorchDispatchMode):
    """Count the bytes of storages allocated inside the block: those `live` now, and the `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ):
        result = function(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {id(t.untyped_storage()) for t in inputs}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in known:
                self.note(tensor.untyped_storage())
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
