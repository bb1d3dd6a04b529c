"""Prepare the Dolly set for finetuning. Guide: howto/prepare_data.md"""

from pathlib import Path

from prepare_json import Columns, PrepareArgs, fetch, prepare, read_records

from lit_llama.cli import run
from lit_llama.errors import UserError

URL = "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl"
NUM_RECORDS = 15_011


def main(
    source: Path | None = None,
    checkpoint_dir: Path = Path("checkpoints/meta-llama/Llama-2-7b-hf"),
    data_dir: Path = Path("data/dolly"),
    val_size: int = 2000,
    max_seq_length: int = 512,
    template: str = "alpaca",
    mask_prompt: bool = True,
    seed: int = 42,
) -> None:
    """Prepare the Dolly set for finetuning. Guide: howto/prepare_data.md

    Args:
        source: JSONL file of instruction, context, response; default: download databricks-dolly-15k (15,011 records).
        checkpoint_dir: the model folder whose tokenizer is used.
        data_dir: where the prepared set goes.
        val_size: records held out for validation.
        max_seq_length: longest sample in tokens; longer ones are cut.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none.
        mask_prompt: learn the response only; false: learn the prompt as well.
        seed: of the split into training and validation records.
    """
    args = PrepareArgs(checkpoint_dir, data_dir, val_size, max_seq_length, template, mask_prompt, seed)
    path = source or fetch(URL, data_dir.resolve().with_name("downloads") / "databricks-dolly-15k.jsonl")
    records = read_records(path)
    if source is None and len(records) != NUM_RECORDS:
        raise UserError(f"{path}: holds {len(records)} records instead of {NUM_RECORDS}. Delete it and run this again")
    prepare(records, path, args, Columns("instruction", "context", "response"))


if __name__ == "__main__":
    run(main)
