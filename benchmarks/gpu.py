"""Run every GPU path once, in one process: speed, memory, and agreement with the plain paths.

    python benchmarks/gpu.py                           # LLaMA 7B on an NVIDIA GPU: under 5 minutes
    python benchmarks/gpu.py --name tiny --device cpu  # in seconds, to see that all parts run

Weights are random and made on the device: nothing is downloaded, and no model is written. Each
result is printed and appended to a file of JSON lines as soon as it is known. A part that fails,
or takes longer than it may, prints its error, and the next one starts.
"""

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

# A plain checkout is enough: nothing needs to be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import estimate_memory
import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from lit_llama import LLaMA, LLaMAConfig, UserError, dropout
from lit_llama.args import AdapterConfig, LoRAConfig
from lit_llama.data import TokenizedDataset
from lit_llama.fast import use_fast_paths
from lit_llama.fast.decoding import optimize_for_inference
from lit_llama.fast.quantization import FOR_TRAINING, quantization
from lit_llama.generation import Sampling, decode, stream
from lit_llama.runtime.args import TrainArgs
from lit_llama.runtime.cli import run
from lit_llama.runtime.devices import peak_memory_bytes, setup_fabric
from lit_llama.storage.methods import METHODS, FullConfig
from lit_llama.training import make_optimizer, train_step
from lit_llama.wrapping import base_linears

ROOT = Path(__file__).resolve().parents[1]
TINY = LLaMAConfig(512, 256, 512, 3, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
WARMUP_STEPS = 3
# Tokens of samples as long as Alpaca's, 2,048 in all.
LENGTHS = (78, 237, 104, 147, 160, 128, 219, 92, 188, 171, 81, 236, 207)
Figures = Iterator[dict[str, Any]]


@dataclass
class Bench:
    """What the parts share. The part `limits` measures the limits of the device."""

    config: LLaMAConfig
    device: torch.device
    steps: int
    out: Path
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
        """Print a line of figures, and append it to the file of JSON lines."""
        for key, value in figures.items():
            figures[key] = float(f"{value:.4g}") if isinstance(value, float) else value
        seconds = round(time.perf_counter() - self.started, 1)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part, "at_s": seconds} | figures) + "\n")
        figures.pop("traceback", None)  # long, so in the file only
        text = ", ".join(f"{key} {value}" for key, value in figures.items() if value is not None)
        print(f"{seconds:6.1f} s  {part}: {text}", flush=True)


def main(
    name: str = "7B",
    device: Literal["cuda", "cpu"] = "cuda",
    steps: PositiveInt = 8,
    parts: tuple[str, ...] = (),
    compile: bool = False,
    out: Path | None = None,
) -> None:
    """Measure training and decoding on a GPU, with random weights: one process, under 5 minutes.

    Needs torch 2.11 or later, lightning, jsonargparse, safetensors and tokenizers, and no files.
    LLaMA 7B takes 25 GB of GPU memory; full finetuning takes 62 GB, and is skipped without them.

    Example:
        python benchmarks/gpu.py
        python benchmarks/gpu.py --name Llama-3-8B --parts lora --parts decode

    Args:
        name: Architecture by name (7B, Llama-3.2-1B, ...) or tiny.
        device: Kind of device.
        steps: Optimizer steps to measure in each part that trains.
        parts: Run only these parts; a wrong name lists them.
        compile: Decode with torch.compile in the end, which takes up to 90 seconds more.
        out: File to append JSON lines to; default is in benchmarks/results.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else Fabric would choose a GPU
    elif not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU. Try --name tiny --device cpu")
    if unknown := set(parts) - PARTS.keys():
        raise UserError(f"--parts {unknown.pop()}: unknown. Known: {', '.join(PARTS)}")
    chosen = parts or [part for part in PARTS if compile or part != "decode-compiled"]
    config = TINY if name == "tiny" else LLaMAConfig.from_name(name)
    out = out or ROOT / f"benchmarks/results/gpu-{name}-{device}.jsonl"
    bench = Bench(config, torch.device(device), steps, out)
    bench.report("environment", model=name, **environment(bench))
    failed = [part for part in chosen if not run_part(part, bench)]
    bench.report("end", parts=len(chosen), failed=failed)
    if failed:
        sys.exit(1)


def run_part(part: str, bench: Bench) -> bool:
    """Run a part and report its figures. Returns False if it failed or took too long."""
    limit, function = PARTS[part]
    limit = limit if bench.on_gpu else 10 * limit

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {limit} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    bench.deadline = time.perf_counter() + 0.6 * limit
    try:
        gc.collect()
        if bench.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for figures in function(bench):
            bench.report(part, **figures)
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
) -> LLaMA:
    """Make a bf16 model on the device; the other arguments do not change its random weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LLaMA(config).to(torch.bfloat16).requires_grad_(False)
    for name, settings in (methods or {}).items():
        METHODS[name].apply(model, settings)
    if fast_paths and methods:
        use_fast_paths(model)
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
    bench: Bench, config: LLaMAConfig, method: str, settings: Any, **options: Any
) -> Callable[[int], tuple[float, float]]:
    """Return a function that takes step `number` and returns loss and gradient norm."""
    fabric = setup_fabric(1, 1, getattr(settings, "precision", "bf16-mixed"))
    methods = {method: settings}
    model = fabric.setup_module(random_model(config, bench.device, methods, **options)).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    args = TrainArgs(micro_batch_tokens=sum(bench.lengths))
    optimizer = fabric.setup_optimizers(make_optimizer(trained, args, methods))
    # Random samples, a micro-batch for each step.
    lengths = torch.tensor(bench.lengths * (WARMUP_STEPS + bench.steps + 1))
    tokens = torch.randint(3, config.vocab_size, (int(lengths.sum()),), dtype=torch.int32)
    offsets = torch.cat((torch.tensor([0]), lengths.cumsum(0)))
    is_label = torch.cat([torch.arange(length) >= 60 for length in lengths])
    tensors = dict(tokens=tokens, offsets=offsets, is_label=is_label, label_counts=lengths - 60)
    data, size = TokenizedDataset(tensors), len(bench.lengths)

    def step(number: int) -> tuple[float, float]:
        ids = list(range(size * number, size * (number + 1)))
        return train_step(fabric, model, optimizer, data, ids, args, 0, number)

    return step


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


@torch.inference_mode()
def forced_logits(bench: Bench, lengths: list[int], **options: Any) -> Tensor:
    """Decode fixed tokens with a tiny model. Returns the logits, (steps, batch, vocab_size)."""
    model = random_model(TINY, bench.device).eval()
    optimize_for_inference(model, bench.device, **options)
    kv_cache = model.make_kv_cache(len(lengths), 32)
    prompts = torch.arange(sum(lengths), device=bench.device)
    last = torch.tensor(lengths, device=bench.device).cumsum(0) - 1
    logits = [model(prompts, lengths, label_positions=last, kv_cache=kv_cache)]
    for number in range(6):
        token = torch.full((len(lengths), 1), 100 + number, device=bench.device)
        logits.append(model(token, kv_cache=kv_cache)[:, -1].clone())
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
        estimated = estimated_gb(bench, method, precision, options.get("quantize"))
        if bench.on_gpu and estimated > torch.cuda.mem_get_info()[0] / 1e9:
            yield dict(skipped="not enough free GPU memory", estimated_gb=estimated)
            return
    step = make_step(bench, bench.config, method, settings, **options)
    for number in range(WARMUP_STEPS):
        loss, _ = step(number)
    times = []
    while len(times) < bench.steps and not (times and bench.late()):
        number += 1
        times.append(bench.seconds(lambda: step(number)))  # noqa: B023
    seconds = sum(times) / len(times)
    tokens = sum(bench.lengths) - len(bench.lengths)  # the last one of a sample is only a label
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LLaMA(bench.config).parameters())
    # Forward, and backward to the inputs; full finetuning also computes the weights' gradients.
    flops = (6 if method == "full" else 4) * parameters * tokens / seconds
    yield dict(
        tokens_per_s=tokens / seconds,
        matmul_share=bench.flops_limit and flops / bench.flops_limit,
        peak_gb=peak_memory_bytes(bench.device) / 1e9,
        estimated_gb=estimated,
        steps=len(times),
        ms_per_step=seconds * 1e3,
        tflops=flops / 1e12,
        loss=loss,
    )
    if profile:
        yield from top_kernels(bench, lambda: step(number + 1))


def estimated_gb(bench: Bench, method: str, precision: str, quantize: str | None) -> float:
    """Return the total that scripts/estimate_memory.py prints for the same step on a GPU."""
    text, tokens = io.StringIO(), sum(bench.lengths)
    # The masks of fake tensors and those of real ones must not meet.
    dropout._mask_table.cache_clear()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(text):
        Path(folder, "config.json").write_text(bench.config.to_json(torch.bfloat16), "utf-8")
        estimate_memory.main(folder, method, 1, precision, quantize, tokens, sample_tokens=128)
    dropout._mask_table.cache_clear()
    return float(text.getvalue().split()[-2])


def decoding(
    bench: Bench,
    quantize: str | None = None,
    prompt_tokens: int = 100,
    new_tokens: int = 200,
    batch_size: int = 1,
    cudnn: bool = True,
    profile: bool = False,
    **options: Any,
) -> Figures:
    """Time greedy decoding from random prompts, and list the kernels of a step."""
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
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

    warmup = token_times(new_tokens)[-1]
    first_token = min(token_times(1)[0] for _ in range(3))
    times = token_times(new_tokens)
    skip = min(8, len(times) // 2)  # the first few include the recording of the CUDA graph
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
    kind = "CUDA" if bench.on_gpu else "CPU"
    activities = [getattr(torch.profiler.ProfilerActivity, name) for name in {"CPU", kind}]
    with torch.profiler.profile(activities=activities) as profiler:
        bench.seconds(work)
    key = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if event.device_type.name == kind]
    events.sort(key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    yield dict(kernels=sum(event.count for event in events), kernel_ms=total / 1e3)
    for event in events[:16]:
        yield dict(ms=getattr(event, key) / 1e3, calls=event.count, kernel=event.key[:90])


# Name: most seconds on a GPU, and a function that yields lines of figures. All are under 5 minutes.
PARTS: dict[str, tuple[int, Callable[[Bench], Figures]]] = {
    "limits": (15, limits),
    "agree-lora": (10, agree_training),
    "agree-dora": (5, partial(agree_training, lora=LoRAConfig(use_dora=True))),
    "agree-nf4": (5, partial(agree_training, quantize="nf4")),
    "agree-fp8": (5, partial(agree_training, quantize="fp8")),
    "agree-decode": (8, agree_decoding),
    "agree-int8": (5, partial(agree_decoding, quantize="int8", limit=0.1)),
    "agree-int4": (5, partial(agree_decoding, quantize="int4", limit=0.7)),
    "lora": (40, partial(training, estimate=True, profile=True)),
    "lora-plain": (15, partial(training, fast_paths=False)),
    "lora-nf4": (30, partial(training, quantize="nf4", estimate=True)),
    "lora-fp8": (15, partial(training, quantize="fp8", profile=True)),
    "adapter": (15, partial(training, method="llama_adapter", settings=AdapterConfig())),
    "full": (30, partial(training, method="full", settings=FullConfig("bf16-true"), estimate=True)),
    "decode": (20, partial(decoding, profile=True)),
    "decode-int8": (15, partial(decoding, quantize="int8", new_tokens=60)),
    "decode-int4": (15, partial(decoding, quantize="int4")),
    "decode-8-prompts": (15, partial(decoding, batch_size=8, new_tokens=100)),
    "decode-long-prompt": (12, partial(decoding, prompt_tokens=1000, new_tokens=60)),
    "decode-plain": (10, partial(decoding, fast_paths=False, new_tokens=20)),
    "decode-no-cudnn": (10, partial(decoding, fast_paths=False, cudnn=False, new_tokens=20)),
    "decode-compiled": (90, partial(decoding, compile=True)),
}


if __name__ == "__main__":
    run(main)
