"""Finetuning beside one other busy process, as on a machine that is not idle.

Each contender runs alone and beside a process that computes without pause, in alternation, once a
round. `python benchmarks/busy.py` runs it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from common import ROOT, alternate, chosen, median, ratios, save, table

from finetune import known_contenders, worker_calls
from lit_llama.runtime.cli import run

QUIET, BUSY = "quiet", "beside a busy process"


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    source: Path = ROOT / "scripts/quickstart_records.json",
    rounds: int = 3,
    steps: int = 12,
    contenders: tuple[str, ...] = ("lit-llama LoRA, bf16", "peft LoRA, bf16"),
    result: str = "busy",
) -> None:
    """Measure finetuning on a quiet machine and beside a busy process.

    Args:
        checkpoint_dir: Model folder.
        source: JSON records of instruction, input and output.
        rounds: Runs of each contender, of each kind.
        steps: Optimizer steps in a round, 4 samples each; the first three are not counted.
        contenders: Name of one of benchmarks/finetune.py to run; repeat the flag for more.
        result: Name of the file in benchmarks/results.
    """
    names = chosen(contenders, known_contenders())
    runs = {f"{name}, {kind}": (name, kind) for name in names for kind in (QUIET, BUSY)}
    with worker_calls(checkpoint_dir, source, steps) as call_worker:

        def measure(label: str) -> str:
            name, kind = runs[label]
            # Our scripts set it on a crowded machine before they import torch, the benchmark after.
            sleeps = {"OMP_WAIT_POLICY": "passive"} if name.startswith("lit-llama") else {}
            if kind == QUIET:
                return call_worker(name)
            with busy_process(), patch.dict(os.environ, sleeps):
                return call_worker(name)

        figures = alternate(runs, rounds, measure)
    rows = []
    for name in names:
        kinds = (f"{name}, {kind}" for kind in (QUIET, BUSY))
        quiet, busy = (median(figures, label, "tokens_per_second") for label in kinds)
        rows.append([name, f"{quiet:,.0f}", f"{busy:,.0f}", f"{busy / quiet:.0%}"])
    first, *others = names
    pairs = [(f"{first}, {kind}", f"{name}, {kind}") for name in others for kind in (QUIET, BUSY)]
    notes = ratios(figures, "tokens_per_second", pairs)
    setting = f"{checkpoint_dir.name}, 4 samples a step cut at 256 tokens, {steps - 3} steps "
    setting += f"counted in each of {rounds} rounds; the busy process computes on one core."
    header = ["contender", f"tokens/s, {QUIET}", f"tokens/s, {BUSY}", "share of the quiet speed"]
    title = "Finetuning beside a busy process"
    save(result, title, setting, table(header, rows), notes, figures)


@contextmanager
def busy_process() -> Iterator[None]:
    """Let another process compute without pause on one core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.terminate()  # a signal that a launcher of Python passes on
        process.wait()


if __name__ == "__main__":
    run(main)
