"""Time and memory of preparing records, beside another version of the project.

git worktree add /tmp/v1.4 v1.4.0
python benchmarks/prepare_data.py --source alpaca.json --other /tmp/v1.4
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from common import ROOT, alternate, median, ratios, save, table

from lit_llama import UserError
from lit_llama.runtime.cli import run


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    source: Path = ROOT / "scripts/quickstart_records.json",
    other: Path | None = None,
    records: int = 52_000,
    rounds: int = 3,
    small_mb: int = 50,
    large_mb: int = 5000,
) -> None:
    """Measure scripts/prepare_json.py: its time, and its memory for a small and a large file.

    Args:
        checkpoint_dir: Model folder.
        source: JSON records of instruction, input and output; repeated if there are too few.
        other: Checkout of another version of this project, to compare with.
        records: Number of records to time.
        rounds: Rounds, in alternation.
        small_mb: Size of the small JSONL file whose memory is measured.
        large_mb: Size of the large one. Their records have a column of 9,000 characters that is
            not used, so that reading them takes minutes and not an hour.
    """
    originals = json.loads(source.read_text("utf-8"))
    versions = {"this version": ROOT} | ({"the other": other} if other else {})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = folder / "records.json"
        file.write_text(json.dumps(list(islice(numbered(originals), records))), "utf-8")

        def measure(name: str) -> str:
            version, template = name.split(", ")
            return prepare(versions[version], file, checkpoint_dir, folder / "data", template)

        names = [f"{v}, {template}" for template in ("alpaca", "chat") for v in versions]
        figures = alternate(names, rounds, measure)
        for size in (small_mb, large_mb):
            lines = folder / "records.jsonl"
            with lines.open("w", encoding="utf-8") as out:
                filler = {"document": "A column that is not used. " * 333}
                for record in numbered(originals):
                    out.write(json.dumps(record | filler) + "\n")
                    if out.tell() >= size * 1e6:
                        break
            printed = prepare(ROOT, lines, checkpoint_dir, folder / "data", "alpaca")
            figures[f"{size:,} MB"] = [json.loads(printed)]
            lines.unlink()

    rows = []
    for name in figures:
        seconds, memory = median(figures, name, "seconds"), median(figures, name, "peak_bytes")
        rows.append([name, f"{seconds:.1f} s", f"{memory / 1e6:,.0f} MB"])
    pairs = [(f"the other, {t}", f"this version, {t}") for t in ("alpaca", "chat")]
    notes = ratios(figures, "seconds", pairs)
    notes += ratios(figures, "peak_bytes", [(f"{large_mb:,} MB", f"{small_mb:,} MB")])
    setting = f"{checkpoint_dir.name}, {records:,} records of {source.name}, and JSONL files of "
    setting += (
        f"{small_mb:,} and {large_mb:,} MB (with a column that is not used); whole processes."
    )
    title, header = "Preparing data", ["what", "time", "peak memory"]
    save("prepare_data", title, setting, table(header, rows), notes, figures)


def numbered(originals: list[dict]) -> Iterator[dict]:
    """Repeat records without end, each with a number of its own."""
    for number, record in enumerate(cycle(originals)):
        yield record | {"instruction": f"{record['instruction']} (No. {number})"}


def prepare(version: Path, file: Path, checkpoint_dir: Path, data_dir: Path, template: str) -> str:
    """Prepare a file in a process. Returns its seconds and peak memory as JSON."""
    command = [sys.executable, str(version / "scripts/prepare_json.py"), "--source", str(file)]
    command += ["--checkpoint_dir", str(checkpoint_dir.resolve()), "--data_dir", str(data_dir)]
    command += ["--val_size", "2000", "--template", template]
    environment = os.environ | {"PYTHONPATH": str(version)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr[-800:]}")
    return done.stdout


# A small process starts the one that is measured, whose peak would else include that of this one.
MEASURE = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_bytes": peak}))
"""


if __name__ == "__main__":
    run(main)
