"""Estimate the memory of a finetuning run, and compare it with that of the GPU.

A step runs on tensors that have shapes but no memory (FakeTensorMode), while every storage is
counted from its allocation to its release: the numbers are those of the code that trains, not of a
formula beside it. Workspaces inside kernels and fragmentation of the allocator are not included.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_llama import dropout
from lit_llama.dropout import token_rows
from lit_llama.fast import kernels, short_attention
from lit_llama.fast.quantization import FOR_TRAINING, quantization
from lit_llama.fast.recompute import LEVELS, set_recompute
from lit_llama.model import GQA, Attention, Context, LLaMA
from lit_llama.runtime.args import RunArgs, TrainArgs
from lit_llama.wrapping import base_linears


def estimate_memory(
    model: LLaMA,
    lengths: list[int],
    precision: str,
    quantize: str | None = None,
    devices: int = 1,
    device: str = "cuda",
    counter: "Counter | None" = None,
) -> dict[str, int]:
    """Return the bytes of weights, gradients, optimizer and activations on each device.

    `model` is on the meta device, with its methods applied, and stays as it is. `lengths` are the
    tokens of each sample of a micro-batch. `counter` may count more than memory.
    """
    model, counter = copy.deepcopy(model), counter or Counter()
    with no_fake_tables(), FakeTensorMode():
        give_fake_memory(model)
        if quantize is not None:
            quantize_frozen(model, quantize)
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        sizes = {"weights": weights, "gradients": trained, "optimizer": 2 * trained}
        if devices > 1:
            sizes = {name: size // devices for name, size in sizes.items()}
            sizes["whole weights meanwhile"] = gathered_bytes(model)
        with as_on_gpu(model) if device == "cuda" else nullcontext():
            count_step(counter, model, lengths, precision)
            sizes["activations"] = counter.peak
    return sizes


def memory_advice(
    model: LLaMA, longest: int, args: RunArgs, train: TrainArgs, devices: int, free: float
) -> str | None:
    """Compare the estimate with a GPU's free memory in bytes.

    `longest` is the number of tokens of the longest sample. Returns a line that names the flag that
    makes the run fit, or the one that makes it faster if much of the memory is free, or None.
    """

    def needed(**changed: Any) -> float:
        values = dict(recompute=train.recompute, quantize=args.quantize)
        values |= dict(micro_batch_tokens=train.micro_batch_tokens) | changed
        tokens = max(longest, values["micro_batch_tokens"])
        level, quantize = values["recompute"], values["quantize"]
        return quick_estimate(model, tokens, args.precision, quantize, devices, level)

    full, room = needed(), 0.95 * free  # a part is lost in kernels and gaps
    trains_all = all(parameter.requires_grad for parameter in model.parameters())
    levels = list(LEVELS)
    level = train.recompute or "activations"
    if full <= room:
        if train.recompute is None and (fastest := needed(recompute="none")) < 0.75 * free:
            size = f"{fastest / 1e9:.1f} of {free / 1e9:.1f} GB"
            return f"--train.recompute none would be faster, and take {size} of GPU memory"
        return None
    changes = [dict(recompute=other) for other in levels[levels.index(level) + 1 :]]
    changes += [dict(recompute="block", micro_batch_tokens=n) for n in (1024, 512) if n >= longest]
    if devices == 1 and not trains_all and args.quantize != "nf4":
        changes.append(dict(quantize="nf4"))
    problem = f"this run takes {full / 1e9:.1f} GB of GPU memory, and {free / 1e9:.1f} GB are free"
    for change in changes:
        if (size := needed(**change)) <= room:
            names = dict(recompute="train.recompute", micro_batch_tokens="train.micro_batch_tokens")
            flags = " ".join(f"--{names.get(name, name)} {value}" for name, value in change.items())
            return f"{problem}. With {flags} it takes {size / 1e9:.1f} GB"
    more = "" if args.quantize else "more GPUs (--devices), "
    return f"{problem}. Use {more}shorter samples or a smaller model"


def quick_estimate(
    model: LLaMA,
    tokens: int,
    precision: str,
    quantize: str | None,
    devices: int,
    recompute: str | None,
) -> float:
    """Return the total of `estimate_memory`, from two models of few layers."""
    # Memory grows by the same amount with each layer. Take the last ones: methods may skip others.
    # Not in full finetuning, where few layers may take less than the head.
    count, layers = len(model.layers), model.layers
    totals = []
    sizes = (2, 4)
    if count < 4 or all(parameter.requires_grad for parameter in model.parameters()):
        sizes = (count,)
    for kept in sizes:
        part = copy.copy(model)  # without copying the layers that are left out
        part._modules = {**model._modules, "layers": layers[-kept:]}
        part = copy.deepcopy(part)
        set_recompute(part, recompute or "activations")
        totals.append(sum(estimate_memory(part, [tokens], precision, quantize, devices).values()))
    return totals[0] + (count - sizes[0]) * (totals[-1] - totals[0]) / 2


@contextmanager
def no_fake_tables() -> Iterator[None]:
    """Keep fake tensors out of the tables that a run makes once."""
    tables = (dropout._mask_table, short_attention._causal_mask)
    for table in tables:
        table.cache_clear()
    try:
        yield
    finally:
        for table in tables:
            table.cache_clear()


def give_fake_memory(model: LLaMA) -> None:
    """Move parameters to the CPU, as code sees it inside a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(tensor, parameter.requires_grad))


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


@contextmanager
def as_on_gpu(model: LLaMA) -> Iterator[None]:
    """Let fake tensors attend by FlashAttention, and count each kernel as one operation."""

    def attend(query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        ends, longest = context.seqs.cu_seqlens, context.seqs.max_length
        options = dict(window_size=(-1, 0), **GQA)
        return varlen_attn(query, key, value, ends, ends, longest, longest, **options)

    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend
    kernels.stand_in = lambda function, args: Counter.current.count_kernel(function, args)
    try:
        yield
    finally:
        kernels.stand_in = None


def count_step(counter: "Counter", model: LLaMA, lengths: list[int], precision: str) -> None:
    """Count forward and backward of a micro-batch, in the second of two equal ones.

    `peak` is beside weights and gradients; the first micro-batch also makes what all of them share.
    """
    count, device = sum(lengths), model.embed_tokens.weight.device
    ids = torch.zeros(count, dtype=torch.long)
    batch = dict(input_ids=ids, lengths=lengths, label_positions=torch.arange(count), labels=ids)
    for parameter in model.train().parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with counter:
        for _ in range(2):
            counter.start()
            autocast = nullcontext()
            if precision == "bf16-mixed":
                autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
            with token_rows(0, 0, list(range(len(lengths))), lengths, device):
                with autocast:
                    loss = model(**batch)
                loss.backward()
            del loss


class Counter(TorchDispatchMode):
    """Count the bytes of storages allocated inside the block: those `live` now, and the `peak`."""

    current: "Counter"  # the one that counts

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakKeyDictionary()
        self.in_kernel = False
        Counter.current = self

    def start(self) -> None:
        """Called before each micro-batch."""

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self.in_kernel:
            self.count(function, (args, kwargs), result)
        return result

    def count_kernel(self, function: Callable, args: tuple) -> Any:
        """Call a function of `fast.kernels` and count it as one operation."""
        if self.in_kernel:
            return function(*args)
        self.in_kernel = True
        result = function(*args)
        self.in_kernel = False
        self.count(function, args, result)
        return result

    def count(self, function: Any, args: Any, result: Any) -> list[Tensor]:
        """Note the new storages of an operation. Returns the tensors that have them."""
        known = {id(tensor.untyped_storage()) for tensor in self.tensors(args)}
        new = [t for t in self.tensors(result) if id(t.untyped_storage()) not in known]
        for tensor in new:
            self.note(tensor.untyped_storage())
        return new

    @staticmethod
    def tensors(values: Any) -> list[Tensor]:
        # packed weights of the CPU have no storage that can be looked at
        found = (value for value in tree_leaves(values) if isinstance(value, Tensor))
        return [tensor for tensor in found if not tensor.is_mkldnn]

    def note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known[storage] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.live -= size
