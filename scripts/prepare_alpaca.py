"""Prepare an Alpaca-format set for finetuning. Guide: howto/prepare_data.md"""

from pathlib import Path

from prepare_json import PrepareArgs, fetch, prepare, read_records

from lit_llama.cli import run
from lit_llama.errors import UserError

URL = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"
NUM_RECORDS = 51_759


def main(
    source: Path | None = None,
    checkpoint_dir: Path = Path("checkpoints/meta-llama/Llama-2-7b-hf"),
    data_dir: Path = Path("data/alpaca"),
    val_size: int = 2000,
    max_seq_length: int = 512,
    template: str = "alpaca",
    mask_prompt: bool = True,
    seed: int = 42,
) -> None:
    """Prepare an Alpaca-format set for finetuning. Guide: howto/prepare_data.md

    Args:
        source: JSON file of instruction, input, output; default: download the cleaned Alpaca set (51,759 records).
        checkpoint_dir: the model folder whose tokenizer is used.
        data_dir: where the prepared set goes.
        val_size: records held out for validation.
        max_seq_length: longest sample in tokens; longer ones are cut.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none.
        mask_prompt: learn the response only; false: learn the prompt as well.
        seed: of the split into training and validation records.
    """
    args = PrepareArgs(checkpoint_dir, data_dir, val_size, max_seq_length, template, mask_prompt, seed)
    path = source or fetch(URL, data_dir.resolve().with_name("downloads") / "alpaca_data_cleaned_archive.json")
    records = read_records(path)
    if source is None and len(records) != NUM_RECORDS:
        raise UserError(f"{path}: holds {len(records)} records instead of {NUM_RECORDS}. Delete it and run this again")
    prepare(records, path, args)


if __name__ == "__main__":
    run(main)
