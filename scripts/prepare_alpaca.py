"""Prepare an Alpaca-format dataset for finetuning. Guide: howto/prepare_data.md"""

from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt
from prepare_json import Columns, PrepareArgs, fetch, prepare

from lit_llama.runtime.cli import run

URL = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"
NUM_RECORDS = 51_759


def main(
    source: Path | None = None,
    checkpoint_dir: Path = Path("checkpoints/meta-llama/Llama-2-7b-hf"),
    data_dir: Path = Path("data/alpaca"),
    val_size: NonNegativeInt | None = None,
    max_seq_length: PositiveInt = 512,
    template: str = "alpaca",
    mask_prompt: bool = True,
    seed: int = 42,
) -> None:
    """Prepare an Alpaca-format dataset for finetuning. Guide: howto/prepare_data.md

    Args:
        source: JSON of instruction, input, output; default: download cleaned Alpaca (51,759).
        checkpoint_dir: Model folder whose tokenizer is used.
        data_dir: Output folder for the tokenized dataset.
        val_size: Number of records held out for validation (default: a tenth, at most 2000).
        max_seq_length: Longest sample in tokens; longer ones are truncated.
        template: alpaca, chatml, llama3, chat (the model folder's own), none, or auto: chat if the
            folder has one, else alpaca.
        mask_prompt: Learn the response only; false: the prompt, too.
        seed: Seed of the split into training and validation records.
    """
    args = PrepareArgs(
        checkpoint_dir, data_dir, val_size, max_seq_length, template, mask_prompt, seed
    )
    path = source or fetch(
        URL, data_dir.resolve().with_name("downloads") / "alpaca_data_cleaned_archive.json"
    )
    prepare(path, args, Columns(), NUM_RECORDS if source is None else None)


if __name__ == "__main__":
    run(main)
