"""What the amount of data costs: preparing 52,000 records, finetuning on few and many samples.

`make bench` runs it.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, alternate, call, median, ratios, save, table

from lit_llama.runtime.cli import run

SMALL, LARGE = "1,000 records", "10,000 records"


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    source: Path = ROOT / "scripts/quickstart_records.json",
    records: int = 52_000,
    rounds: int = 3,
    steps: int = 12,
) -> None:
    """Measure preparing, and LoRA finetuning on 1,000 and on 10,000 records of the same kind.

    Args:
        checkpoint_dir: Model folder.
        source: JSON records of instruction, input and output; repeated if there are too few.
        records: Number of records to prepare.
        rounds: Rounds of finetuning.
        steps: Steps of finetuning, 4 samples each; the first three are not counted.
    """
    originals = json.loads(source.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def prepare(count: int) -> tuple[float, float]:
            """Prepare records in `folder / count`: seconds and peak bytes of the process."""
            file = folder / f"{count}.json"
            changed = []
            for n in range(count):
                record = originals[n % len(originals)]
                changed.append(record | {"instruction": f"{record['instruction']} (No. {n})"})
            file.write_text(json.dumps(changed), "utf-8")
            command = [sys.executable, ROOT / "scripts/prepare_json.py", "--source", file]
            command += ["--checkpoint_dir", checkpoint_dir, "--data_dir", folder / str(count)]
            command += ["--max_seq_length", "256", "--val_size", "0"]
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds = time.perf_counter() - started
            return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024

        sets = {SMALL: 1000, LARGE: 10_000}
        for count in sets.values():
            prepare(count)
        seconds, memory = prepare(records)  # the largest, so the peak of all children is its own
        recipe = ["--worker", "lit-llama LoRA, bf16", "--steps", steps]
        recipe += ["--checkpoint_dir", checkpoint_dir]

        def train(name: str) -> str:
            data_dir = folder / str(sets[name])
            return call("benchmarks/finetune.py", *recipe, "--data_dir", data_dir)

        figures = alternate(sets, rounds, train)
    rows = [[f"preparing {records:,} records", f"{seconds:.1f} s", f"{memory / 1e9:.2f} GB"]]
    for name in figures:
        speed = median(figures, name, "tokens_per_second")
        used = median(figures, name, "peak_memory_bytes")
        rows.append([f"finetuning from {name}", f"{speed:.0f} tokens/s", f"{used / 1e9:.2f} GB"])
    notes = ratios(figures, "tokens_per_second", [(LARGE, SMALL)])
    notes += ratios(figures, "peak_memory_bytes", [(LARGE, SMALL)])
    setting = f"{checkpoint_dir.name}, records cut at 256 tokens; LoRA, 4 samples a step, "
    setting += "other samples from each set."
    raw = figures | {"preparing": [{"seconds": seconds, "peak_memory_bytes": memory}]}
    title, header = "Preparing data, and what its amount costs", ["work", "", "peak memory"]
    save("prepare", title, setting, table(header, rows), notes, raw)


if __name__ == "__main__":
    run(main)
