"""What the amount of data costs: preparing 52,000 records, and finetuning from a small and a large prepared set.

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

from lit_llama.cli import run

SMALL, LARGE = "1,000 records", "10,000 records"


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    source: Path = ROOT / "scripts/quickstart_records.json",
    records: int = 52_000,
    rounds: int = 3,
    steps: int = 12,
) -> None:
    """Measure preparing, and LoRA finetuning from 1,000 and from 10,000 prepared records of the same kind.

    Args:
        checkpoint_dir: the model folder.
        source: JSON records of instruction, input and output, repeated with changes until there are enough.
        records: how many are prepared.
        rounds: of finetuning.
        steps: of finetuning, 4 samples each; the first three are not counted.
    """
    originals = json.loads(source.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def prepare(count: int) -> tuple[float, float]:
            """Seconds and peak bytes of a process that prepares so many records in `folder / count`."""
            file = folder / f"{count}.json"
            repeated = (originals[n % len(originals)] for n in range(count))
            changed = [r | {"instruction": f"{r['instruction']} (No. {n})"} for n, r in enumerate(repeated)]
            file.write_text(json.dumps(changed), "utf-8")
            flags = ["--source", file, "--checkpoint_dir", checkpoint_dir, "--data_dir", folder / str(count)]
            flags += ["--max_seq_length", "256", "--val_size", "0"]
            started = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "scripts/prepare_json.py", *flags], check=True, capture_output=True)
            return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024

        sets = {SMALL: 1000, LARGE: 10_000}
        for count in sets.values():
            prepare(count)
        seconds, memory = prepare(records)  # the largest, so the peak of all children is its own
        recipe = ["--worker", "lit-llama LoRA", "--checkpoint_dir", checkpoint_dir, "--steps", steps]
        train = lambda name: call("benchmarks/finetune.py", *recipe, "--data_dir", folder / str(sets[name]))  # noqa: E731
        figures = alternate(sets, rounds, train)
    rows = [[f"preparing {records:,} records", f"{seconds:.1f} s", f"{memory / 1e9:.2f} GB"]]
    for name in figures:
        speed, used = median(figures, name, "tokens_per_second"), median(figures, name, "peak_memory_bytes")
        rows.append([f"finetuning from {name}", f"{speed:.0f} tokens/s", f"{used / 1e9:.2f} GB"])
    notes = [
        note for key in ("tokens_per_second", "peak_memory_bytes") for note in ratios(figures, key, [(LARGE, SMALL)])
    ]
    setting = f"{checkpoint_dir.name}, records cut at 256 tokens; LoRA, 4 samples a step, other samples from each set."
    raw = figures | {"preparing": [{"seconds": seconds, "peak_memory_bytes": memory}]}
    save(
        "prepare",
        "Preparing data, and what its amount costs",
        setting,
        table(["work", "", "peak memory"], rows),
        notes,
        raw,
    )


if __name__ == "__main__":
    run(main)
