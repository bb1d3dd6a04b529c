"""What each flag of finetune/*.py costs: tokens/s and peak memory, measured and estimated.

`make bench` runs it.
"""

import csv
import re
import tempfile
from pathlib import Path

from common import ROOT, call, save, table

from lit_llama.runtime.cli import run
from lit_llama.runtime.hardware import default_device

RUNS = (
    "lora",
    "lora --train.fast_paths false",
    "lora --train.micro_batch_tokens 512",
    "lora --train.micro_batch_tokens 4096",
    "lora --train.recompute activations",
    "lora --train.recompute block",
    "lora --quantize nf4",
    "lora --precision bf16-true",
    "lora --precision 32-true",
    "lora --lora.targets [all-linear]",
    "lora --lora.targets [all-linear] --lora.use_dora true",
    "adapter",
    "adapter_v2",
    "full",
    "full --precision bf16-true",
    "full --train.recompute block",
)


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    source: Path = ROOT / "scripts/quickstart_records.json",
    steps: int = 4,
    batch_size: int = 40,
    runs: tuple[str, ...] = RUNS,
) -> None:
    """Measure the finetuning scripts, each run in a process of its own.

    Args:
        checkpoint_dir: Model folder.
        source: JSON records of instruction, input and output.
        steps: Steps of each run; the first one is not counted.
        batch_size: Samples per step.
        runs: Scripts with flags, as a list.
    """
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        data = ["--checkpoint_dir", checkpoint_dir, "--data_dir", f"{temporary}/data"]
        call("scripts/prepare_json.py", "--source", source, *data, "--val_size", 10)
        for number, line in enumerate(runs):
            method, *flags = line.split()
            folder = Path(temporary) / str(number)
            recipe = ["--train.max_steps", steps, "--train.batch_size", batch_size]
            call(f"finetune/{method}.py", *data, *recipe, "--out_dir", folder, *flags)
            with (folder / "metrics.csv").open(newline="") as file:
                counted = list(csv.DictReader(file))[1:]
            numbers = [int(row["tokens"]) for row in counted]
            speeds = [float(row["tokens_per_second"]) for row in counted]
            tokens = sum(numbers)
            seconds = sum(number / each for number, each in zip(numbers, speeds, strict=True))
            speed = tokens / seconds
            measured = int(counted[-1]["peak_memory_bytes"])
            sample_tokens = tokens // (len(counted) * batch_size)
            expected = estimate(checkpoint_dir, method, flags, sample_tokens)
            figures[line] = dict(tokens_per_second=speed, peak_memory_bytes=measured)
            figures[line]["estimated_bytes"] = expected
            print(f"{line}: {figures[line]}", flush=True)
            memory = [f"{measured / 1e9:.2f} GB", f"{expected / 1e9:.2f} GB"]
            rows.append([f"`{line}`", f"{speed:,.0f}", *memory, f"{expected / measured - 1:+.0%}"])
    header = ["run", "tokens/s", "peak memory", "estimated", "off by"]
    setting = f"{checkpoint_dir.name}, {batch_size} samples a step, "
    setting += f"{steps - 1} steps of each run counted."
    save("flags", "What the flags cost and buy", setting, table(header, rows), [], figures)


def estimate(checkpoint_dir: Path, method: str, flags: list[str], sample_tokens: int) -> float:
    """Return the bytes by scripts/estimate_memory.py, which has the same names of flags."""
    same = [flag.replace("--train.", "--") for flag in flags]
    if "--fast_paths" in same:  # the estimate is always with fast paths
        same = []
    model = ["--model", checkpoint_dir, "--method", method]
    model += ["--device", default_device().type, "--sample_tokens", sample_tokens]
    printed = call("scripts/estimate_memory.py", *model, *same)
    return float(re.search(r"total +([\d.]+) GB", printed)[1]) * 1e9


if __name__ == "__main__":
    run(main)
