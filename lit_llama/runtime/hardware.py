"""The machine: its device, its memory, and the precision and kernels that are fast on its CPU.

CPUs differ: with AMX or AVX-512 bf16, bf16 is several times as fast as fp32, on others half as
fast. So the alternatives are timed on matrices of the model's shape, in a fraction of a second.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F

import lit_llama.runtime.environment  # noqa: F401, sets variables that oneDNN reads at first use
from lit_llama.config import LLaMAConfig
from lit_llama.errors import UsageError
from lit_llama.fast.packing import FrozenPackedLinear, PackedLinear, can_pack
from lit_llama.fast.short_attention import LengthBuckets, ShortAttentionFunction
from lit_llama.model import PackedSequences, causal_attention
from lit_llama.runtime.args import RunArgs, TrainArgs
from lit_llama.storage.model_folder import weight_files

# dtype of the loaded weights; parameters added by methods are fp32 under each
PRECISIONS = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "32-true": torch.float32}
PRECISION_NAMES = {torch.bfloat16: "bf16-true", torch.float32: "32-true"}  # for inference
BF16, FP32 = torch.bfloat16, torch.float32
CLEARLY = 1.15  # how many times as fast a choice should be that takes more memory
CACHED_WEIGHTS = 2**24  # elements, of which a CPU's cache holds only a part
Key = TypeVar("Key")
Seconds = dict[tuple[torch.dtype, bool], float]  # by dtype, and whether weights are packed


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # cuDNN plans its attention anew for each shape; the other kernels are as fast
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of the memory allocated on the GPU, or of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def available_memory_bytes() -> float:
    """Return the CPU memory that this process can still get; infinity if the system has no file."""
    found = [float("inf")]
    for file, key in (("/proc/meminfo", "MemAvailable:"), ("/sys/fs/cgroup/memory.max", "")):
        lines = Path(file).read_text("utf-8").splitlines() if Path(file).exists() else []
        words = [line.removeprefix(key).split() for line in lines if line.startswith(key)]
        found += [int(number) * (1024 if unit else 1) for number, *unit in words if number != "max"]
    return min(found)


def inference_dtype(
    precision: str, checkpoint_dir: Path | None = None, tokens: int = 1
) -> torch.dtype:
    """Return the dtype of the weights for inference.

    "auto" is bf16 on a GPU, and on the CPU what computes `tokens` at once faster with the model in
    `checkpoint_dir`; a line on stderr says so.
    """
    if precision == "auto":
        if default_device().type == "cuda":
            return BF16
        seconds = time_linears(LLaMAConfig.from_checkpoint(checkpoint_dir), tokens)
        return PRECISIONS[faster_precision(seconds, "bf16-true", 4, checkpoint_dir)]
    if precision not in ("bf16-true", "32-true"):
        raise UsageError(f"--precision {precision}: unknown. Known: auto, bf16-true, 32-true")
    return PRECISIONS[precision]


def choose_for_training(
    args: RunArgs, train: TrainArgs, trains_all: bool
) -> tuple[RunArgs, TrainArgs]:
    """Return arguments in which the precision is not "auto", and the kernels are not None.

    On one CPU both are measured, and a line on stderr names the precision. Elsewhere the precision
    is bf16-mixed, and the kernels have no effect.
    """
    precision, folder = args.precision, args.checkpoint_dir
    kernels = train.kernels if train.fast_paths else []
    one_cpu = default_device().type == "cpu" and args.devices * args.num_nodes == 1
    if one_cpu and (precision == "auto" or kernels is None):
        seconds = time_linears(LLaMAConfig.from_checkpoint(folder), tokens=256, train=True)
        if precision == "auto":
            # Full finetuning holds gradients and two averages as well, in fp32 in either case.
            precision = faster_precision(seconds, "bf16-mixed", 16 if trains_all else 4, folder)
        if kernels is None:
            kernels = faster_kernels(seconds, PRECISIONS[precision], folder, trains_all)
    if precision == "auto":
        precision = "bf16-mixed"
    return replace(args, precision=precision), replace(train, kernels=kernels)


def faster_kernels(
    seconds: Seconds, dtype: torch.dtype, checkpoint_dir: Path, trains_all: bool
) -> list[str]:
    """Return the kernels that are faster in training, by the times of `time_linears`."""
    packed, plain = seconds.get((dtype, True), float("inf")), seconds[dtype, False]
    # Weights that train change at each step. The others are held twice.
    packs = plain / packed > CLEARLY and not trains_all and fits(2 * dtype.itemsize, checkpoint_dir)
    attends = short_attention_pays(LLaMAConfig.from_checkpoint(checkpoint_dir), dtype)
    return ["packed"] * packs + ["short_attention"] * attends


def faster_precision(seconds: Seconds, bf16: str, fp32_bytes: int, checkpoint_dir: Path) -> str:
    """Return `bf16`, or "32-true" if that is clearly faster and fits; print which, and why.

    `fp32_bytes` are those per parameter.
    """
    best = {d: min(s for (kind, _), s in seconds.items() if kind == d) for d in (BF16, FP32)}
    ratio = best[BF16] / best[FP32]  # how many times as fast fp32 is
    if ratio < CLEARLY:
        chosen, reason = bf16, f"{1 / ratio:.1f} times as fast as 32-true on this CPU"
    elif fits(fp32_bytes, checkpoint_dir):
        chosen, reason = "32-true", f"{ratio:.1f} times as fast as {bf16} on this CPU"
    else:
        chosen, reason = bf16, f"32-true is {ratio:.1f} times as fast, but memory is too short"
    print(f"precision {chosen}: {reason}", file=sys.stderr, flush=True)
    return chosen


def fits(bytes_per_parameter: int, checkpoint_dir: Path) -> bool:
    """Tell whether weights of this size take less than half of the available memory."""
    stored = sum(file.stat().st_size for file in weight_files(checkpoint_dir))  # two bytes each
    return stored / 2 * bytes_per_parameter < available_memory_bytes() / 2


def time_linears(config: LLaMAConfig, tokens: int, train: bool = False) -> Seconds:
    """Time a projection of the MLP for this number of tokens, forward and in training backward.

    Large ones are cut, and tiny ones enlarged: a pass should take about a millisecond.
    """
    hidden, inner = max(config.hidden_size, 512), min(max(config.intermediate_size, 512), 2048)
    if tokens > 1:
        tokens = max(32, min(tokens, 2**28 // (hidden * inner)))
    # For one token, reading the weights takes the time: from memory, as in a whole model.
    copies = max(1, CACHED_WEIGHTS // (hidden * inner)) if tokens == 1 else 1
    calls = {}
    for dtype in (BF16, FP32):
        x = torch.full((tokens, hidden), 0.1, dtype=dtype)
        grad = torch.full((tokens, inner), 0.1, dtype=dtype)
        weights = [torch.full((inner, hidden), 0.01, dtype=dtype) for _ in range(copies)]
        make = FrozenPackedLinear if train else PackedLinear
        layers = [make(weight, None) for weight in weights] if can_pack(dtype) else []

        def plain(x=x, grad=grad, weights=weights) -> None:
            for weight in weights:
                F.linear(x, weight)
                if train:
                    grad @ weight

        def packed(x=x, grad=grad, layers=layers) -> None:
            for layer in layers:
                layer.matmul(x) if train else layer(x)
                if train:
                    layer.grad_matmul(grad)

        calls[dtype, False] = plain
        if layers:
            calls[dtype, True] = packed
    return time_calls(calls)


def short_attention_pays(config: LLaMAConfig, dtype: torch.dtype) -> bool:
    """Tell whether matmul attention is faster than torch's own in training, for two samples."""
    seqs = PackedSequences([128, 128], torch.device("cpu"))
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    shapes = [(256, count, config.head_dim) for count in heads]
    inputs = [torch.full(shape, 0.1, dtype=dtype, requires_grad=True) for shape in shapes]
    buckets = LengthBuckets(seqs.lengths)
    forward = {
        True: lambda: ShortAttentionFunction.apply(*inputs, buckets),
        False: lambda: causal_attention(*inputs, seqs),
    }
    calls = {
        kind: lambda call=call: torch.autograd.grad(call().sum(), inputs)
        for kind, call in forward.items()
    }
    seconds = time_calls(calls)
    return seconds[True] < seconds[False]


def time_calls(calls: dict[Key, Callable[[], object]], rounds: int = 3) -> dict[Key, float]:
    """Return the shortest time of each call, in alternation, after one that is not counted."""
    seconds = dict.fromkeys(calls, float("inf"))
    # On one core: several would also wait for whatever else runs on one of them.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(rounds + 1):
            for key, call in calls.items():
                started = time.perf_counter()
                call()
                if number:
                    seconds[key] = min(seconds[key], time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return seconds
