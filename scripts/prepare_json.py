"""Prepare your own JSON, JSONL or CSV for finetuning. Guide: howto/prepare_data.md

The other prepare scripts are this one with another source and other column names.
"""

import hashlib
import http.client
import json
import urllib.request
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt
from tqdm import tqdm

from lit_llama.errors import UserError
from lit_llama.runtime.cli import run
from lit_llama.storage.records import Columns, encode_answers, read_records, to_messages

FILES = {"train.safetensors", "val.safetensors", "meta.json", "checksums.txt"}


def fetch(url: str, file: Path) -> Path:
    """Download a file if it is missing. It gets its name once it is complete."""
    from hub import check_secure

    from lit_llama.storage.files import atomic_write

    if file.is_file():
        return file
    try:
        with (
            atomic_write(file) as temporary,
            urllib.request.urlopen(url, timeout=60) as response,  # noqa: S310 our own addresses
            temporary.open("wb") as out,
        ):
            check_secure(response.url)  # after redirects
            size = int(response.headers.get("Content-Length") or 0)
            bar = tqdm(total=size or None, desc=file.name, unit="B", unit_scale=True, disable=None)
            with bar:
                while chunk := response.read(1 << 20):
                    out.write(chunk)
                    bar.update(len(chunk))
            if out.tell() < size:
                raise UserError(f"{url}: broke off after {out.tell()} of {size} bytes. Run again")
    except (OSError, http.client.HTTPException) as error:
        hint = "Download it by hand and pass it with --source"
        raise UserError(f"{url}: cannot be downloaded ({error}). {hint}") from None
    return file


@dataclass
class PrepareArgs:
    """The flags that all prepare scripts share; their `main` documents them."""

    checkpoint_dir: Path
    data_dir: Path
    val_size: int
    max_seq_length: int
    template: str
    mask_prompt: bool
    seed: int


class Samples:
    """Samples as flat arrays of token ids, the form in which they are stored."""

    def __init__(self) -> None:
        self.tokens = array("i")
        self.offsets = array("q", [0])
        self.prompt_lengths = array("i")

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def add(self, ids: list[int], prompt_length: int) -> None:
        self.tokens.extend(ids)
        self.offsets.append(len(self.tokens))
        self.prompt_lengths.append(prompt_length)


def prepare(
    records: list[Any], source: Path, args: PrepareArgs, columns: Columns = Columns()
) -> dict[str, Any]:
    """Tokenize records and write `train.safetensors`, `val.safetensors` and `meta.json`.

    A sample is the prompt, the response and the end token. A conversation with several answers
    gives one sample for each. Samples longer than `max_seq_length` are truncated at the end, and
    dropped if the prompt leaves no room for a response token. meta.json counts both.

    Returns:
        Content of meta.json.
    """
    if args.val_size >= len(records):
        problem = f"should be less than the number of records, {len(records)}"
        raise UserError(f"--val_size {args.val_size}: {problem}")
    check_data_dir(args.data_dir)
    # imported after the flags are read, so that --help is fast
    import torch

    from lit_llama.config import LLaMAConfig
    from lit_llama.prompts import get_template, stop_ids
    from lit_llama.tokenizer import Tokenizer

    tokenizer = Tokenizer(args.checkpoint_dir)
    config = LLaMAConfig.from_checkpoint(args.checkpoint_dir)
    template = get_template(args.template, tokenizer)
    end_id = stop_ids(template, tokenizer, config.eos_token_id)[0]

    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(records), generator=generator).tolist()
    held_out = set(order[: args.val_size])
    train, val = Samples(), Samples()
    cut = dropped = 0
    progress = tqdm(records, desc="tokenizing", unit="records", disable=None)
    for number, record in enumerate(progress):
        where = f"{source}, record {number + 1}"
        messages = to_messages(record, columns, where)
        samples = val if number in held_out else train
        for prompt, response in encode_answers(messages, template, tokenizer, end_id, where):
            ids = (prompt + response)[: args.max_seq_length]
            # a sample needs a label, and nothing predicts the first token
            if len(prompt) >= args.max_seq_length or len(ids) < 2:
                dropped += 1
                continue
            cut += len(prompt) + len(response) > args.max_seq_length
            samples.add(ids, len(prompt) if args.mask_prompt else 0)
    if not len(train):
        hint = f"Raise --max_seq_length {args.max_seq_length}"
        raise UserError(f"{source}: no sample is left to train on. {hint}")
    meta = dict(
        source=str(source),
        sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
        records=len(records),
        train_samples=len(train),
        val_samples=len(val),
        cut_samples=cut,
        dropped_samples=dropped,
        train_tokens=len(train.tokens),
        tokenizer_sha256=tokenizer.sha256,
        template=args.template,
        max_seq_length=args.max_seq_length,
        mask_prompt=args.mask_prompt,
        val_size=args.val_size,
        seed=args.seed,
    )
    save(args.data_dir, train, val, meta)
    print(
        f"{args.data_dir}: {len(train)} samples to train, {len(val)} to validate; "
        f"{cut} cut at {args.max_seq_length} tokens, "
        f"{dropped} dropped for want of room for a response"
    )
    return meta


def check_data_dir(data_dir: Path) -> None:
    """Raise UserError unless `data_dir` is missing, empty, or a dataset, which is then replaced."""
    found = {path.name for path in data_dir.iterdir()} if data_dir.exists() else set()
    if found and ("meta.json" not in found or found - FILES):
        hint = "Move it away, or pass another --data_dir"
        name = min(found - FILES, default="files")
        raise UserError(f"{data_dir}: exists already, and holds {name}. {hint}")


def save(data_dir: Path, train: Samples, val: Samples, meta: dict[str, Any]) -> None:
    """Write a dataset, or replace the one in `data_dir`; storage/datasets.py loads it."""
    import numpy as np
    import torch

    from lit_llama.storage.files import atomic_write, save_tensors, write_checksums

    with atomic_write(data_dir) as folder:
        folder.mkdir()
        for name, samples in (("train", train), ("val", val)):
            arrays = vars(samples).items()
            tensors = {key: torch.from_numpy(np.array(values)) for key, values in arrays}
            save_tensors(tensors, folder / f"{name}.safetensors")
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", "utf-8")
        write_checksums(folder)


def main(
    source: Path,
    checkpoint_dir: Path = Path("checkpoints/meta-llama/Llama-2-7b-hf"),
    data_dir: Path = Path("data/mine"),
    val_size: NonNegativeInt = 100,
    max_seq_length: PositiveInt = 512,
    template: str = "alpaca",
    mask_prompt: bool = True,
    seed: int = 42,
    columns: Columns = Columns(),
) -> None:
    """Prepare your own JSON, JSONL or CSV for finetuning. Guide: howto/prepare_data.md

    Example:
        python scripts/prepare_json.py --source my.csv --columns.instruction question

    Args:
        source: .json (array), .jsonl (object per line) or .csv of columns or `messages`.
        checkpoint_dir: Model folder whose tokenizer is used.
        data_dir: Output folder for the tokenized dataset.
        val_size: Number of records held out for validation.
        max_seq_length: Longest sample in tokens; longer ones are truncated.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none.
        mask_prompt: Learn the response only; false: the prompt, too.
        seed: Seed of the split into training and validation records.
        columns: Names of the columns.
    """
    args = PrepareArgs(
        checkpoint_dir, data_dir, val_size, max_seq_length, template, mask_prompt, seed
    )
    prepare(read_records(source), source, args, columns)


if __name__ == "__main__":
    run(main)
