"""What the benchmarks share: processes in alternation, the machine's limits, the results.

A result is a JSON file in benchmarks/results, with the raw figures. `python benchmarks/report.py`
makes RESULTS.md from them.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from lit_llama import UserError
from lit_llama.runtime.hardware import default_device

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
CPU_INFO = Path("/proc/cpuinfo")  # on Linux
# what matters for the speed of matmuls in bf16, fp32 and int8, as Linux names it
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
Figures = dict[str, list[dict[str, float]]]  # contender -> what it measured in each round


def call(script: str, *flags: object) -> str:
    """Run a script of the project and return its output. Raises UserError if it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{script} ended with status {done.returncode}: {done.stderr[-800:]}")
    return done.stdout


def alternate(names: Iterable[str], rounds: int, measure: Callable[[str], str]) -> Figures:
    """Let each contender print its figures as JSON, in alternation, `rounds` times."""
    figures: Figures = {}
    for number in range(rounds):
        for name in names:
            figures.setdefault(name, []).append(json.loads(measure(name).splitlines()[-1]))
            print(f"round {number + 1}: {name} {figures[name][-1]}", flush=True)
    return figures


def median(figures: Figures, name: str, key: str) -> float:
    return statistics.median(figure[key] for figure in figures[name])


def ratios(figures: Figures, key: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Compare each pair of contenders that both ran, in a line."""
    lines = []
    for one, two in pairs:
        if one in figures and two in figures:
            ratio = median(figures, one, key) / median(figures, two, key)
            lines.append(f"{one}: {ratio:.2f} times the {key.replace('_', ' ')} of {two}")
    return lines


def best_ratios(figures: Figures, pairs: list[tuple[str, str]]) -> list[str]:
    """Compare the speed of each pair in a line, each contender in its fastest precision."""
    best, labels = {}, {}
    for name in dict.fromkeys(name for pair in pairs for name in pair):
        endings = {run: run.removeprefix(name).strip(", ") for run in figures}
        runs = [run for run, ending in endings.items() if ending in ("", *PRECISIONS)]
        if runs:
            run = max(runs, key=lambda run: median(figures, run, "tokens_per_second"))
            labels[name] = f"{name} at its best ({precision_of(run)})" if len(runs) > 1 else run
            best[labels[name]] = figures[run]
    pairs = [(labels.get(one, one), labels.get(two, two)) for one, two in pairs]
    return ratios(best, "tokens_per_second", pairs)


def precision_of(name: str) -> str:
    """Return the precision of a contender by its name: bf16 unless that says fp32."""
    return "fp32" if "fp32" in name else "bf16"


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def chosen(contenders: tuple[str, ...], known: dict[str, str]) -> tuple[str, ...]:
    """Return the contenders that are required, by default all whose package is installed."""
    installed = {"lit_llama", *(d.metadata["Name"] for d in importlib.metadata.distributions())}
    names = contenders or tuple(name for name, package in known.items() if package in installed)
    for name in names:
        if name not in known:
            raise UserError(f"--contenders: no {name!r}. There are: {', '.join(known)}")
    for name in known.keys() - set(names):
        print(f"left out: {name}")
    return names


def cpu_info(key: str) -> str:
    """Return what Linux tells of the first core, "" if it does not."""
    lines = CPU_INFO.read_text("utf-8").splitlines() if CPU_INFO.exists() else []
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(values, "")


def cpu_name() -> str:
    """Return the processor's name, as Linux tells it."""
    return cpu_info("model name") or platform.machine()


def cpu_features() -> list[str]:
    """Return those of the processor's features that matter for speed, as Linux tells them."""
    flags = cpu_info("flags").split()
    return [feature for feature in CPU_FEATURES if feature in flags]


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command() -> str:
    """Return the command line, without the folders of this machine."""
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv]
    return shlex.join(["python", *words])


def save(
    name: str,
    title: str,
    setting: str,
    table: str,
    notes: list[str],
    figures: object,
    kind: str | None = None,
) -> None:
    """Print the table, and write it to benchmarks/results/NAME-cpu.json or -cuda.json.

    `kind` is neither of them if nothing was measured, but counted.
    """
    on_gpu = default_device().type == "cuda"
    cores = f"{len(os.sched_getaffinity(0))} cores of a shared machine, {cpu_name()}"
    if features := cpu_features():
        cores += f" with {', '.join(features)}"
    result = {
        "title": title,
        "command": command(),
        "setting": setting,
        "device": "No device" if kind else torch.cuda.get_device_name() if on_gpu else cores,
        "date": str(datetime.date.today()),
        "versions": versions("torch", "peft", "transformers", "litgpt"),
        "table": table,
        "notes": notes,
        "figures": figures,
    }
    print("\n".join([table, "", *notes]))
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}-{kind or ('cuda' if on_gpu else 'cpu')}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def best_seconds(work: Callable[[], object], times: int = 10) -> float:
    """Return the time of the shortest of several runs."""
    best = float("inf")
    for _ in range(times):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def matmul_flops(dtype: torch.dtype = torch.bfloat16) -> float:
    """Measure the FLOP/s of a large matmul."""
    device = default_device()
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / best_seconds(lambda: torch.mm(a, b))


def bandwidth() -> float:
    """Measure the bytes per second that a sum over a large tensor reads."""
    device = default_device()
    data = torch.ones(2**26 if device.type == "cpu" else 2**30, device=device)
    return data.nbytes / best_seconds(data.sum)
