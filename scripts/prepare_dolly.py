"""Prepare the Dolly dataset for finetuning. Guide: howto/prepare_data.md"""

from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt
from prepare_json import Columns, PrepareArgs, fetch, prepare, read_records

from lit_llama.errors import UserError
from lit_llama.runtime.cli import run

URL = "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl"
NUM_RECORDS = 15_011


def main(
    source: Path | None = None,
    checkpoint_dir: Path = Path("checkpoints/meta-llama/Llama-2-7b-hf"),
    data_dir: Path = Path("data/dolly"),
    val_size: NonNegativeInt = 2000,
    max_seq_length: PositiveInt = 512,
    template: str = "alpaca",
    mask_prompt: bool = True,
    seed: int = 42,
) -> None:
    """Prepare the Dolly dataset for finetuning. Guide: howto/prepare_data.md

    Args:
        source: JSONL of instruction, context, response; default: download Dolly (15,011).
        checkpoint_dir: Model folder whose tokenizer is used.
        data_dir: Output folder for the tokenized dataset.
        val_size: Number of records held out for validation.
        max_seq_length: Longest sample in tokens; longer ones are truncated.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none.
        mask_prompt: Learn the response only; false: the prompt, too.
        seed: Seed of the split into training and validation records.
    """
    args = PrepareArgs(
        checkpoint_dir, data_dir, val_size, max_seq_length, template, mask_prompt, seed
    )
    path = source or fetch(
        URL, data_dir.resolve().with_name("downloads") / "databricks-dolly-15k.jsonl"
    )
    records = read_records(path)
    if source is None and len(records) != NUM_RECORDS:
        problem = f"holds {len(records)} records instead of {NUM_RECORDS}"
        raise UserError(f"{path}: {problem}. Delete it and run this again")
    prepare(records, path, args, Columns("instruction", "context", "response"))


if __name__ == "__main__":
    run(main)
