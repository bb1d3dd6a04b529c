"""What the rank of a LoRA buys: validation loss, trained parameters, file size and time.

The table of howto/lora_explained.md. No `make` target runs it: it needs a dataset worth learning.
"""

import csv
import re
import statistics
import tempfile
from pathlib import Path

from common import call, save, table

from lit_llama.runtime.cli import run


def main(
    source: Path,
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
    epochs: int = 1,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    val_size: int = 200,
) -> None:
    """Finetune once with each rank, alpha being twice the rank, all else being equal.

    Args:
        source: JSON records of instruction, input and output.
        checkpoint_dir: Model folder.
        ranks: Ranks of the LoRAs, as a list.
        epochs: Epochs of each run.
        batch_size: Samples per step.
        learning_rate: Peak learning rate.
        val_size: Records to validate on.
    """
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        data = ["--checkpoint_dir", checkpoint_dir, "--data_dir", f"{temporary}/data"]
        prepared = call(
            "scripts/prepare_json.py", "--source", source, *data, "--val_size", val_size
        )
        for r in ranks:
            folder = Path(temporary) / str(r)
            recipe = ["--train.epochs", epochs, "--train.batch_size", batch_size]
            recipe += ["--train.learning_rate", learning_rate, "--train.warmup_steps", 10]
            recipe += ["--train.eval_interval", 10**6]
            lora = ["--lora.r", r, "--lora.alpha", 2 * r, "--out_dir", folder]
            printed = call("finetune/lora.py", *data, *lora, *recipe)
            before, after = re.search(r"val loss (\S+) -> (\S+), ", printed).groups()
            with (folder / "metrics.csv").open(newline="") as file:
                steps = list(csv.DictReader(file))
            # by the median step's speed: other work on the machine slows some of them
            speed = statistics.median(float(row["tokens_per_second"]) for row in steps)
            training = sum(int(row["tokens"]) for row in steps) / speed
            trained = re.search(r"training (\S+) of", printed)[1]
            figures[r] = {
                "trained": int(trained.replace(",", "")),
                "file_bytes": (folder / "adapter_model.safetensors").stat().st_size,
                "first_val_loss": float(before),
                "val_loss": float(after),
                "training_seconds": training,
            }
            print(f"r {r}: {figures[r]}", flush=True)
            size = f"{figures[r]['file_bytes'] / 1e6:.2f} MB"
            rows.append([str(r), after, trained, size, f"{training:.0f} s"])
    header = ["r", "validation loss", "trained parameters", "file", "training"]
    samples = re.search(r"(\d+) samples to train", prepared)[1]
    setting = f"{checkpoint_dir.name}, query and value, alpha 2 r; {samples} samples, "
    setting += f"{epochs} epoch(s), {batch_size} a step, peak learning rate {learning_rate}; "
    setting += f"{val_size} to validate, whose loss is {before} before. "
    setting += "The time is that of the steps alone, by the median step's speed."
    save("rank", "What the rank of a LoRA buys", setting, table(header, rows), [], figures)


if __name__ == "__main__":
    run(main)
