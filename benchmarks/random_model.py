"""Speed and memory of finetuning and of decoding, on a model with random weights: nothing to download.

    python benchmarks/random_model.py --name 7B

makes the model and a prepared set in a temporary folder, runs 50 steps of `finetune/lora.py` (or with --method full of
`finetune/full.py`, in bf16-true, which takes 54 GB for 7B) and 200 tokens of `generate/base.py` as any user would, and
prints a row for benchmarks/RESULTS.md.
"""

import csv
import datetime
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from lit_llama import LLaMA, LLaMAConfig, UserError
from lit_llama.checkpoint import save_checkpoint
from lit_llama.cli import run
from lit_llama.generation import default_device

ROOT = Path(__file__).resolve().parent.parent


def main(
    name: str = "7B",
    method: str = "lora",
    steps: int = 50,
    batch_size: int = 16,
    new_tokens: int = 200,
    work_dir: Path | None = None,
) -> None:
    """Measure finetuning and decoding of a model with random bf16 weights.

    Args:
        name: the architecture, one of LLaMAConfig.from_name's.
        method: lora, adapter, adapter_v2 or full.
        steps: of finetuning; speed is the median over all but the first five.
        batch_size: samples a step.
        new_tokens: how many to decode.
        work_dir: where the weights go, 14 GB for 7B; default: a temporary folder.
    """
    if steps <= 5:
        raise UserError(f"--steps {steps}: should be more than 5")
    with tempfile.TemporaryDirectory(dir=work_dir) as temporary:
        folder = Path(temporary)
        config = LLaMAConfig.from_name(name)
        save_checkpoint(folder / "model", config, random_weights(config), tokenizer_of_words(config.vocab_size))
        write_records(folder / "records.json", config.vocab_size)
        model = ["--checkpoint_dir", folder / "model"]
        call("scripts/prepare_json.py", "--source", folder / "records.json", "--data_dir", folder / "data", *model)
        recipe = ["--train.max_steps", steps, "--train.batch_size", batch_size, "--train.epochs", 1000]
        recipe += ["--train.eval_samples", 8, "--train.keep_last", 1]
        recipe += ["--precision", "bf16-true"] if method == "full" else []
        out = ["--data_dir", folder / "data", "--out_dir", folder / "out"]
        call(f"finetune/{method}.py", *model, *out, *recipe)
        with (folder / "out/metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        speed = statistics.median(float(row["tokens_per_second"]) for row in rows[5:])
        memory = int(rows[-1]["peak_memory_bytes"])
        prompt = " ".join(f"w{number}" for number in range(10, 60))
        decoding = ["--template", "none", "--prompt", prompt, "--max_new_tokens", new_tokens]
        printed = call("generate/base.py", *model, *decoding)
    decoded, used = re.search(r"([\d.]+) tokens/sec\s+Memory used: ([\d.]+) GB", printed).groups()
    device = torch.cuda.get_device_name() if default_device().type == "cuda" else "CPU"
    when = f"torch {torch.__version__}, {datetime.date.today()}"
    print(f"| {name} | {method} | {device} | {speed:,.0f} | {memory / 1e9:.2f} GB | {decoded} | {used} GB | {when} |")


def random_weights(config: LLaMAConfig) -> Iterator[tuple[str, Tensor]]:
    """Our names and bf16 tensors, made one at a time on the device there is."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LLaMA(config).named_parameters()}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=default_device())
        yield name, tensor.fill_(1.0) if len(shape) == 1 else tensor.normal_(std=0.02)


def tokenizer_of_words(vocab_size: int) -> dict[str, bytes]:
    """Tokenizer files with a token a word: w3, w4..."""
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    options = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(options).encode()}


def write_records(file: Path, vocab_size: int, count: int = 2000) -> None:
    """Records with about as many tokens as Alpaca's: 60 of prompt and 10 to 300 of response."""
    rng = random.Random(0)

    def words(number: int) -> str:
        return " ".join(f"w{rng.randrange(3, vocab_size)}" for _ in range(number))

    records = [{"instruction": words(30), "output": words(round(10 * 30 ** rng.random()))} for _ in range(count)]
    file.write_text(json.dumps(records), "utf-8")


def call(script: str, *flags: object) -> str:
    """Run a script in the project's folder and return what it printed."""
    print(f"$ python {script} {' '.join(map(str, flags))}"[:200], flush=True)
    command = [sys.executable, script, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError(f"{script} ended with status {done.returncode}: {done.stdout[-500:]}")
    return done.stdout


if __name__ == "__main__":
    run(main)
