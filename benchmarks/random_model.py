"""The benchmarks on a model with random bf16 weights: nothing to download.

    make bench-gpu

makes Llama 2 7B and Alpaca-shaped records in a temporary folder, then runs benchmarks/finetune.py and generate.py on
them.
"""

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from common import call
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from lit_llama import LLaMA, LLaMAConfig
from lit_llama.checkpoint import save_checkpoint
from lit_llama.cli import run
from lit_llama.generation import default_device


def main(
    name: str = "7B",
    steps: int = 15,
    batch_size: int = 16,
    rounds: int = 1,
    contenders: tuple[str, ...] = (
        *("lit-llama LoRA", "lit-llama LoRA, nf4", "lit-llama LoRA, fp8", "lit-llama full", "peft LoRA", "litgpt LoRA"),
    ),
    work_dir: Path | None = None,
) -> None:
    """Measure finetuning and decoding of a model with random weights.

    Args:
        name: the architecture, one of LLaMAConfig.from_name's.
        steps: of finetuning; the first three are not counted.
        batch_size: samples a step.
        rounds: how often each contender runs.
        contenders: of benchmarks/finetune.py; those that are not installed must be left out.
        work_dir: where the weights go, 14 GB for 7B; default: a temporary folder.
    """
    with tempfile.TemporaryDirectory(dir=work_dir) as temporary:
        # a name that litgpt knows the shape of
        folder = Path(temporary) / ("Llama-2-7b-hf" if name == "7B" else name)
        config = LLaMAConfig.from_name(name)
        save_checkpoint(folder, config, random_weights(config), tokenizer_of_words(config.vocab_size))
        write_records(Path(temporary) / "records.json", config.vocab_size)
        model = ["--checkpoint_dir", folder, "--rounds", rounds]
        recipe = ["--source", Path(temporary) / "records.json", "--steps", steps, "--batch_size", batch_size]
        recipe += ["--max_seq_length", 512, "--contenders", json.dumps(contenders)]
        print(call("benchmarks/finetune.py", *model, *recipe), flush=True)
        print(call("benchmarks/generate.py", *model, "--new_tokens", 200), flush=True)


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


if __name__ == "__main__":
    run(main)
