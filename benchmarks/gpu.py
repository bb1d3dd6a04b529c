"""Run every GPU path once, in one process: speed, memory, and agreement with the plain paths.

    python benchmarks/gpu.py                           # LLaMA 7B on an NVIDIA GPU: under 6 minutes
    python benchmarks/gpu.py --peers                   # beside PEFT, transformers and LitGPT: 4
    python benchmarks/gpu.py --name tiny --device cpu  # in seconds, to see that all parts run

Weights are random and made on the device: nothing is downloaded, and no model is written. Each
result is printed and saved as soon as it is known. A part that fails, or takes longer than it may,
prints its error, and the next one starts.
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

# A plain checkout is enough: nothing needs to be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from lit_llama import LLaMA, LLaMAConfig, UserError
from lit_llama.args import AdapterConfig, LoRAConfig
from lit_llama.data import TokenizedDataset
from lit_llama.fast import kernels, optimize_for_training
from lit_llama.fast.decoding import optimize_for_inference
from lit_llama.fast.quantization import BITSANDBYTES, FOR_TRAINING, NF4Linear, quantization
from lit_llama.generation import Sampling, decode, stream
from lit_llama.model import PackedSequences, causal_attention, rope_table
from lit_llama.runtime.args import TrainArgs
from lit_llama.runtime.cli import run
from lit_llama.runtime.devices import setup_fabric
from lit_llama.runtime.hardware import peak_memory_bytes
from lit_llama.runtime.memory import estimate_memory
from lit_llama.storage.methods import METHODS, FullConfig
from lit_llama.training import make_optimizer, train_step
from lit_llama.wrapping import base_linears

ROOT = Path(__file__).resolve().parents[1]
TINY = LLaMAConfig(512, 256, 512, 3, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
WARMUP_STEPS = 3
# Tokens of samples as long as Alpaca's, 2,048 in all.
LENGTHS = (78, 237, 104, 147, 160, 128, 219, 92, 188, 171, 81, 236, 207)
BUDGET, PEERS_BUDGET = 360, 240  # seconds of all parts together
Figures = Iterator[dict[str, Any]]


class OutOfTime(BaseException):
    """Ends a part. Not an Exception, which torch.compile would take for one of its own."""


@dataclass
class Bench:
    """What the parts share. The part `limits` measures the limits of the device."""

    config: LLaMAConfig
    device: torch.device
    steps: int
    out: Path
    title: str = "Every path"
    budget: float = BUDGET
    lines: list[dict[str, Any]] = field(default_factory=list)  # all figures so far
    flops_limit: float | None = None  # FLOPs per second
    bytes_limit: float | None = None  # bytes per second, read or written

    def __post_init__(self) -> None:
        self.on_gpu = self.device.type == "cuda"
        self.lengths = LENGTHS if self.on_gpu else LENGTHS[:2]  # of the samples of a micro-batch
        self.started = time.perf_counter()
        self.deadline = 0.0  # of a part: measuring ends, so that it can still report

    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def seconds(self, work: Callable[[], object], times: int = 1) -> float:
        """Return the mean time of `times` calls, with the device's work."""
        synchronize = torch.cuda.synchronize if self.on_gpu else lambda: None
        synchronize()
        started = time.perf_counter()
        for _ in range(times):
            work()
        synchronize()
        return (time.perf_counter() - started) / times

    def report(self, part: str, **figures: Any) -> None:
        """Print a line of figures, and save all lines so far."""
        for key, value in figures.items():
            figures[key] = float(f"{value:.4g}") if isinstance(value, float) else value
        seconds = round(time.perf_counter() - self.started, 1)
        self.lines.append({"part": part, "at_s": seconds} | figures)
        self.save()
        print(f"{seconds:6.1f} s  {part}: {as_text(figures)}", flush=True)

    def save(self) -> None:
        """Write the file that benchmarks/report.py makes a section of RESULTS.md from."""
        start, *lines = self.lines
        cells = [f"| {line['part']} | {as_text(line)} |" for line in lines]
        packages = ("torch", "triton", "transformers", "peft", "litgpt", "bitsandbytes")
        result = {
            "title": f"{self.title}, {start['model']} with random weights",
            "command": common.command(),
            "setting": f"Commit {start.get('commit')}.",
            "device": start.get("card", "CPU"),
            "date": start["date"],
            "versions": common.versions(*packages),
            "table": "\n".join(["| part | figures |", "| --- | --- |", *cells]),
            "notes": [],
            "figures": self.lines,
        }
        self.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def as_text(figures: dict[str, Any]) -> str:
    """Return figures as `name value, ...`, without a traceback, which is long."""
    hidden = ("part", "at_s", "traceback")
    shown = {key: value for key, value in figures.items() if key not in hidden}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)


def main(
    name: str = "7B",
    device: Literal["cuda", "cpu"] = "cuda",
    steps: PositiveInt = 8,
    parts: tuple[str, ...] = (),
    peers: bool = False,
    compile: bool = False,
    out: Path | None = None,
) -> None:
    """Measure training and decoding on a GPU, with random weights: one process, under 6 minutes.

    Needs torch 2.11 or later, lightning, jsonargparse, safetensors and tokenizers, with --peers
    also transformers and peft, and no files. LLaMA 7B takes 25 GB of GPU memory, with --peers 48;
    full finetuning takes 62 GB, and is skipped without them. --peers takes 4 minutes.

    Example:
        python benchmarks/gpu.py
        python benchmarks/gpu.py --name Llama-3-8B --parts lora --parts decode

    Args:
        name: Architecture by name (7B, Llama-3.2-1B, ...) or tiny.
        device: Kind of device.
        steps: Optimizer steps to measure in each part that trains.
        parts: Run only these parts; a wrong name lists them.
        peers: Measure training and decoding beside PEFT, transformers and, if installed, LitGPT.
        compile: Decode with torch.compile in the end, which takes up to 90 seconds more.
        out: JSON file of the results; default is in benchmarks/results.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else Fabric would choose a GPU
    elif not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU. Try --name tiny --device cpu")
    known, suffix, settings = PARTS, "", {}
    if peers:
        import gpu_peers  # it imports this file

        known, suffix = gpu_peers.PARTS, "-peers"
        settings = dict(title="Beside peers", budget=PEERS_BUDGET)
    if unknown := set(parts) - known.keys():
        raise UserError(f"--parts {unknown.pop()}: unknown. Known: {', '.join(known)}")
    chosen = parts or [part for part in known if compile or part != "decode-compiled"]
    config = TINY if name == "tiny" else LLaMAConfig.from_name(name)
    out = out or ROOT / f"benchmarks/results/gpu-{name}{suffix}-{device}.json"
    bench = Bench(config, torch.device(device), steps, out, **settings)
    bench.report("environment", model=name, **environment(bench))
    failed = [part for part in chosen if not run_part(part, bench, *known[part])]
    bench.report("end", parts=len(chosen), failed=failed)
    if failed:
        sys.exit(1)


def run_part(part: str, bench: Bench, limit: float, function: Callable[[Bench], Figures]) -> bool:
    """Run a part and report its figures. Returns False if it failed or took too long."""
    if not bench.on_gpu:
        limit = 10 * limit
    elif (left := bench.budget - (time.perf_counter() - bench.started)) < limit:
        limit = max(1.0, left)

    def stop(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit, 5)
    bench.deadline = time.perf_counter() + 0.6 * limit
    try:
        gc.collect()
        if bench.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for figures in function(bench):
            bench.report(part, **figures)
    except OutOfTime:
        bench.report(part, error=f"not done after {limit:.3g} s", traceback=traceback.format_exc())
        return False
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        bench.report(part, error=line, traceback=traceback.format_exc())
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return True


def environment(bench: Bench) -> dict[str, Any]:
    """Return the device, versions and commit that the figures belong to."""

    def output(program: str, *words: str) -> str | None:
        if path := shutil.which(program):
            done = subprocess.run([path, *words], cwd=ROOT, capture_output=True, text=True)
            return done.stdout.strip() or None
        return None

    found = dict(torch=torch.__version__, date=datetime.now().isoformat(timespec="minutes"))
    if (ROOT / ".git").exists():
        found["commit"] = output("git", "describe", "--always", "--dirty")
    if bench.on_gpu:
        card = torch.cuda.get_device_properties(bench.device)
        found |= dict(card=card.name, memory_gb=card.total_memory / 1e9, cuda=torch.version.cuda)
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = output("nvidia-smi", *query)
    return found


def random_model(
    config: LLaMAConfig,
    device: torch.device,
    methods: dict[str, Any] | None = None,
    quantize: str | None = None,
    fast_paths: bool = True,
    recompute: str | None = None,
) -> LLaMA:
    """Make a bf16 model on the device; the other arguments do not change its random weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LLaMA(config).to(torch.bfloat16).requires_grad_(False)
    for name, settings in (methods or {}).items():
        METHODS[name].apply(model, settings)
    if methods:
        optimize_for_training(model, device, fast_paths, recompute)
    # Names only: a reference to a layer would keep its weight beside the quantized one.
    to_quantize = {name for name, m in base_linears(model).items() if m is not model.lm_head}
    torch.manual_seed(0)  # methods may have used random numbers
    for name in [name for name, _ in model.named_modules()]:
        module = model.get_submodule(name)
        for leaf, old in list(module.named_parameters(recurse=False)):
            value = old.detach()
            if old.is_meta:  # else a method has initialized it
                value = torch.empty_like(value, device=device)
                value.fill_(1.0) if old.dim() == 1 else value.normal_(std=config.hidden_size**-0.5)
            setattr(module, leaf, nn.Parameter(value.to(device), old.requires_grad))
        if quantize and name in to_quantize:
            layer = quantization(quantize, FOR_TRAINING)(module.weight.detach())
            model.set_submodule(name, layer)
    for module in model.modules():
        if hasattr(module, "init_from_base"):  # such as DoRA's magnitude
            module.init_from_base()
    return model


def make_step(
    bench: Bench,
    config: LLaMAConfig,
    method: str,
    settings: Any,
    max_grad_norm: float = 1.0,
    **options: Any,
) -> Callable[[int], tuple[float, float]]:
    """Return a function that takes step `number` and returns loss and gradient norm."""
    fabric = setup_fabric(1, 1, getattr(settings, "precision", "bf16-mixed"))
    methods = {method: settings}
    model = fabric.setup_module(random_model(config, bench.device, methods, **options)).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    args = TrainArgs(micro_batch_tokens=sum(bench.lengths), max_grad_norm=max_grad_norm)
    optimizer = fabric.setup_optimizers(make_optimizer(trained, args, methods))
    data = random_samples(bench, config)

    def step(number: int) -> tuple[float, float]:
        ids = samples_of(bench, number)
        return train_step(fabric, model, optimizer, data, ids, args, 0, number)

    return step


def random_samples(bench: Bench, config: LLaMAConfig) -> TokenizedDataset:
    """Make a micro-batch for each step, of another number of tokens, as in a real run."""
    steps = range(WARMUP_STEPS + bench.steps + 1)
    lengths = torch.tensor([length - number % 8 for number in steps for length in bench.lengths])
    generator = torch.Generator().manual_seed(0)
    size = (int(lengths.sum()),)
    tokens = torch.randint(3, config.vocab_size, size, dtype=torch.int32, generator=generator)
    offsets = torch.cat((torch.tensor([0]), lengths.cumsum(0)))
    is_label = torch.cat([torch.arange(length) >= 60 for length in lengths])
    tensors = dict(tokens=tokens, offsets=offsets, is_label=is_label, label_counts=lengths - 60)
    return TokenizedDataset(tensors)


def samples_of(bench: Bench, number: int) -> list[int]:
    """Return the samples of a step."""
    size = len(bench.lengths)
    return list(range(size * number, size * (number + 1)))


def limits(bench: Bench) -> Figures:
    """Measure what the device does at best: a large bf16 matmul, and a copy."""
    size = 8192 if bench.on_gpu else 512
    a = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    source = torch.zeros(2**31 if bench.on_gpu else 2**25, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    for times in (3, 20):  # the first time is to warm up
        bench.flops_limit = 2 * size**3 / bench.seconds(lambda: a @ a, times)
        bench.bytes_limit = 2 * source.nbytes / bench.seconds(lambda: target.copy_(source), times)
    yield dict(matmul_tflops=bench.flops_limit / 1e12, copy_tb_per_s=bench.bytes_limit / 1e12)


def agree_training(bench: Bench, lora: LoRAConfig = LoRAConfig(), **options: Any) -> Figures:
    """Compare three steps of a tiny model by the fast paths with those by the plain ones."""
    plain = make_step(bench, TINY, "LORA", lora, fast_paths=False)
    fast = make_step(bench, TINY, "LORA", lora, **options)
    expected, actual = (torch.tensor([step(n) for n in range(3)]) for step in (plain, fast))
    loss_error, norm_error = ((actual - expected) / expected).abs().amax(dim=0).tolist()
    yield dict(loss_error=loss_error, gradient_norm_error=norm_error)
    if not (loss_error < 0.02 and norm_error < 0.2):
        raise ArithmeticError("losses or gradients differ too much from those of the plain paths")


def agree_attention(bench: Bench) -> Figures:
    """Compare attention with fewer key heads than query heads, and its gradients, with fp32."""
    lengths = [300, 17, 1, 511]
    seqs = PackedSequences(lengths, bench.device)
    shapes = [(sum(lengths), heads, 128) for heads in (8, 2, 2, 8)]
    *qkv, grad = (torch.randn(shape, device=bench.device).bfloat16() for shape in shapes)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype).requires_grad_(True) for x in qkv]
        attended = causal_attention(*inputs, seqs)
        results.append([attended, *torch.autograd.grad(attended, inputs, grad.to(dtype))])
    errors = [relative_error(one, two) for two, one in zip(*results, strict=True)]
    names = ("attention_error", "query_error", "key_error", "value_error")
    yield dict(zip(names, errors, strict=True))
    if not all(error < 0.02 for error in errors):
        raise ArithmeticError("attention differs too much from that in fp32")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def compiled_kernels(bench: Bench) -> Figures:
    """Compare each kernel of lit_llama/fast/kernels.py with the function as it is written."""
    # Forget the tiny models of the parts before: else hidden sizes would count as variable.
    torch.compiler.reset()
    config, device = bench.config, bench.device
    tokens = sum(bench.lengths)
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    x, y, weight = random(tokens, hidden), random(tokens, hidden), random(inner, hidden)
    wide = [random(tokens, inner) for _ in range(3)]
    rotated = random(tokens, heads, config.head_dim)
    rope = rope_table(config, torch.arange(tokens, device=device))
    masks = torch.rand(4096, hidden, device=device) > 0.05, torch.arange(tokens, device=device)
    nf4 = NF4Linear(weight)
    int8 = torch.randint(-127, 128, weight.shape, device=device, dtype=torch.int8)
    cases = {
        "rope": (rotated, *rope),
        "rope_backward": (rotated, *rope),
        "rms_norm": (x, weight[0], 1e-5),
        "rms_norm_backward": (y, x, weight[0], 1e-5, False),
        "swiglu": tuple(wide[:2]),
        "swiglu_backward": tuple(wide),
        "masked": (x, *masks),
        "masked_both": (x, y, *masks),
        "dequantize_nf4": (nf4.nf4, nf4.absmax, nf4.pairs),
        "to_fp8": (x,),
        "int8_matmul": (x[:1], int8, weight[:, 0]),
    }
    for name, args in cases.items():
        call = getattr(kernels, name)
        plain = call.__wrapped__
        expected, actual = as_tuple(plain(*args)), as_tuple(call(*args))
        errors = list(map(relative_error, actual, expected))
        moved = sum(t.nbytes for t in (*args, *actual) if isinstance(t, Tensor))
        if "masked" in name:  # of the table, a row for each token
            moved += x.numel() - masks[0].nbytes
        seconds = device_seconds(bench, partial(call, *args))
        yield dict(
            kernel=name,
            errors=" ".join(f"{error:.1e}" for error in errors),
            us=seconds * 1e6,
            as_written_us=device_seconds(bench, partial(plain, *args)) * 1e6,
            share_of_copy=bench.bytes_limit and moved / seconds / bench.bytes_limit,
        )
        if not all(error < 0.02 for error in errors):
            raise ArithmeticError(f"{name} differs too much from the function as it is written")
    if bench.on_gpu and BITSANDBYTES:
        error = relative_error(nf4.dequantize_by_bitsandbytes().view_as(weight), nf4.dequantize())
        seconds = device_seconds(bench, nf4.dequantize_by_bitsandbytes)
        yield dict(kernel="bitsandbytes' NF4", errors=f"{error:.1e}", us=seconds * 1e6)
    yield dict(compiled=kernels.COMPILE)


def device_seconds(bench: Bench, work: Callable[[], object], times: int = 10) -> float:
    """Return the mean time that the kernels of a call take, without that of their launches."""
    if not bench.on_gpu:
        return bench.seconds(work, times)
    with profiled(bench) as profiler:
        for _ in range(times):
            work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in kernel_events(profiler)) / times / 1e6


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """Copy the tensors of a kernel's result, which may be overwritten."""
    found = result if isinstance(result, tuple) else (result,)
    return tuple(tensor.clone() for tensor in found if tensor is not None)


@torch.inference_mode()
def forced_logits(bench: Bench, lengths: list[int], **options: Any) -> Tensor:
    """Decode fixed tokens twice with a tiny model. Returns logits (steps, batch, vocab_size).

    The second answer uses the recorded step of the first one.
    """
    model = random_model(TINY, bench.device).eval()
    optimize_for_inference(model, bench.device, **options)
    logits = []
    for answer in range(2):
        kv_cache = model.make_kv_cache(len(lengths), 32)
        sizes = [length + answer for length in lengths]
        prompts = torch.arange(sum(sizes), device=bench.device) + 50 * answer
        last = torch.tensor(sizes, device=bench.device).cumsum(0) - 1
        logits.append(model(prompts, sizes, label_positions=last, kv_cache=kv_cache))
        for number in range(6):
            token = torch.full((len(lengths), 1), 100 + number, device=bench.device)
            logits.append(model(token, kv_cache=kv_cache)[:, -1].clone())
        del kv_cache  # so that it is lent again
    return torch.stack(logits).float()


def agree_decoding(bench: Bench, quantize: str | None = None, limit: float = 0.02) -> Figures:
    """Compare logits of a tiny model, optimized for inference, with those of the plain model."""
    for lengths in ([7], [5, 9]):
        expected = forced_logits(bench, lengths, fast_paths=False)
        actual = forced_logits(bench, lengths, quantize=quantize)
        error = ((actual - expected).norm() / expected.norm()).item()
        yield dict(prompts=len(lengths), logits_error=error)
        if not error < limit:
            raise ArithmeticError("logits differ too much from those of the plain model")


def training(
    bench: Bench,
    method: str = "LORA",
    settings: Any = LoRAConfig(),
    estimate: bool = False,
    profile: bool = False,
    **options: Any,
) -> Figures:
    """Time optimizer steps of one micro-batch, and list the kernels of a step."""
    precision = getattr(settings, "precision", "bf16-mixed")
    estimated = None
    if estimate:
        estimated = estimated_gb(bench, method, settings, precision, options.get("quantize"))
        if bench.on_gpu and estimated > torch.cuda.mem_get_info()[0] / 1e9:
            yield dict(skipped="not enough free GPU memory", estimated_gb=estimated)
            return
    step = make_step(bench, bench.config, method, settings, **options)
    for number in range(WARMUP_STEPS):
        loss, _ = step(number)
    times, tokens = [], 0
    data = random_samples(bench, bench.config)
    while len(times) < bench.steps and not (times and bench.late()):
        number += 1
        times.append(bench.seconds(lambda: step(number)))  # noqa: B023
        # The last token of a sample is only a label.
        tokens += sum(data.lengths[index] - 1 for index in samples_of(bench, number))
    seconds, tokens = sum(times) / len(times), tokens / len(times)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LLaMA(bench.config).parameters())
    # Forward, and backward to the inputs; full finetuning also computes the weights' gradients.
    flops = (6 if method == "full" else 4) * parameters * tokens / seconds
    yield dict(
        tokens_per_s=tokens / seconds,
        matmul_share=bench.flops_limit and flops / bench.flops_limit,
        peak_gb=peak_memory_bytes(bench.device) / 1e9,
        estimated_gb=estimated,
        reserved_gb=torch.cuda.max_memory_reserved() / 1e9 if bench.on_gpu else None,
        synchronizations=synchronizations(lambda: step(number)) if bench.on_gpu else None,
        steps=len(times),
        ms_per_step=seconds * 1e3,
        tflops=flops / 1e12,
        loss=loss,
    )
    if profile:
        yield from top_kernels(bench, lambda: step(number + 1))


def synchronizations(work: Callable[[], object]) -> int:
    """Count how often a call waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def estimated_gb(
    bench: Bench, method: str, settings: Any, precision: str, quantize: str | None
) -> float:
    """Return the total that scripts/estimate_memory.py prints for the same step on a GPU."""
    with torch.device("meta"):
        model = LLaMA(bench.config).to(torch.bfloat16).requires_grad_(False)
    METHODS[method].apply(model, settings)
    optimize_for_training(model, torch.device("cuda"))
    return sum(estimate_memory(model, list(bench.lengths), precision, quantize).values()) / 1e9


def decoding(
    bench: Bench,
    quantize: str | None = None,
    prompt_tokens: int = 100,
    new_tokens: int = 200,
    batch_size: int = 1,
    cudnn: bool = False,
    warm: bool = True,
    profile: bool = False,
    **options: Any,
) -> Figures:
    """Time greedy decoding from random prompts, and list the kernels of a step."""
    torch.backends.cuda.enable_cudnn_sdp(cudnn)  # False is what the project chooses
    model = random_model(bench.config, bench.device).eval()
    read = weight_bytes(model)
    optimize_for_inference(model, bench.device, quantize, **options)
    optimize_peak = peak_memory_bytes(bench.device)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    if quantize:
        read = weight_bytes(model)
    prompts = list(torch.randint(3, bench.config.vocab_size, (batch_size, prompt_tokens)))

    def token_times(max_new_tokens: int) -> list[float]:
        started, times = time.perf_counter(), []
        new = max_new_tokens if bench.on_gpu else min(20, max_new_tokens)
        for _ in stream(model, prompts, Sampling(new, temperature=0)):
            times.append(time.perf_counter() - started)
            if bench.late() and len(times) > 2:
                break
        return times

    # The first answer records the CUDA graph, and the next one replays it. Not `warm`: each length
    # of the cache is new, as in a first answer.
    warmup = token_times(new_tokens if warm else 2)[-1]
    times = token_times(new_tokens)
    first_token = min(token_times(1)[0] for _ in range(3))
    skip = min(8, len(times) // 2)
    rate = (len(times) - 1 - skip) / (times[-1] - times[skip])
    yield dict(
        tokens_per_s=batch_size * rate,
        bandwidth_share=bench.bytes_limit and rate * read / bench.bytes_limit,
        first_token_ms=first_token * 1e3,
        peak_gb=peak_memory_bytes(bench.device) / 1e9,
        optimize_peak_gb=optimize_peak / 1e9,
        weights_gb=read / 1e9,
        tokens=len(times),
        answer_s=times[-1],
        warmup_s=warmup,
    )
    if profile:
        tokens = decode(model, prompts, Sampling(8, temperature=0))
        for _ in range(4):
            next(tokens)
        yield from top_kernels(bench, lambda: next(tokens))


def weight_bytes(model: LLaMA) -> int:
    """Bytes of the weights that a pass reads: all but an embedding that is not also the head."""
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return total if model.lm_head is None else total - model.embed_tokens.weight.nbytes


def top_kernels(bench: Bench, work: Callable[[], object]) -> Figures:
    """Profile one call. Yields the totals, then the kernels (CPU: operators) that take longest."""
    with profiled(bench) as profiler:
        bench.seconds(work)
    key = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    events = kernel_events(profiler, "CUDA" if bench.on_gpu else "CPU")
    events.sort(key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    yield dict(kernels=sum(event.count for event in events), kernel_ms=total / 1e3)
    for event in events[:16]:
        yield dict(ms=getattr(event, key) / 1e3, calls=event.count, kernel=event.key[:90])


def profiled(bench: Bench) -> torch.profiler.profile:
    kinds = ("CPU", "CUDA") if bench.on_gpu else ("CPU",)
    return torch.profiler.profile(
        activities=[getattr(torch.profiler.ProfilerActivity, kind) for kind in kinds]
    )


def kernel_events(profiler: torch.profiler.profile, kind: str = "CUDA") -> list[Any]:
    """Return what ran, without the annotations that enclose it."""
    events = profiler.key_averages()
    return [e for e in events if e.device_type.name == kind and not e.is_user_annotation]


# Name: most seconds on a GPU, and a function that yields lines of figures. BUDGET is for all.
PARTS: dict[str, tuple[int, Callable[[Bench], Figures]]] = {
    "limits": (15, limits),
    "agree-attention": (5, agree_attention),
    "agree-lora": (45, agree_training),  # compiles
    "agree-block": (8, partial(agree_training, recompute="block")),
    "agree-dora": (8, partial(agree_training, lora=LoRAConfig(use_dora=True))),
    "agree-nf4": (15, partial(agree_training, quantize="nf4")),
    "agree-fp8": (15, partial(agree_training, quantize="fp8")),
    "agree-decode": (8, agree_decoding),
    "agree-int8": (15, partial(agree_decoding, quantize="int8", limit=0.1)),
    "agree-int4": (8, partial(agree_decoding, quantize="int4", limit=0.7)),
    "kernels": (45, compiled_kernels),
    "lora": (40, partial(training, estimate=True, profile=True)),
    "lora-none": (12, partial(training, recompute="none")),
    "lora-block": (12, partial(training, recompute="block")),
    "lora-plain": (15, partial(training, fast_paths=False)),
    "lora-nf4": (30, partial(training, quantize="nf4", estimate=True)),
    "lora-fp8": (20, partial(training, quantize="fp8", profile=True)),
    "adapter": (15, partial(training, method="llama_adapter", settings=AdapterConfig())),
    "full": (30, partial(training, method="full", settings=FullConfig("bf16-true"), estimate=True)),
    "decode": (20, partial(decoding, profile=True)),
    "decode-int8": (20, partial(decoding, quantize="int8", new_tokens=60)),
    "decode-int4": (15, partial(decoding, quantize="int4")),
    "decode-8-prompts": (15, partial(decoding, batch_size=8, new_tokens=100)),
    "decode-long-prompt": (12, partial(decoding, prompt_tokens=1000, new_tokens=60)),
    "decode-plain": (8, partial(decoding, fast_paths=False, warm=False, new_tokens=20)),
    "decode-cudnn": (
        8,
        partial(decoding, fast_paths=False, warm=False, cudnn=True, new_tokens=20),
    ),
    "decode-compiled": (90, partial(decoding, compile=True)),
}


if __name__ == "__main__":
    run(main)
