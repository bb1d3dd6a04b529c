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

import numpy as np
import torch
from download import check_secure
from tqdm import tqdm

from lit_llama import LLaMAConfig, Tokenizer, UserError
from lit_llama.checksums import CHECKSUMS, write_checksums
from lit_llama.cli import run
from lit_llama.files import check_new_folder, replacing, save_tensors
from lit_llama.prompts import get_template, stop_ids
from lit_llama.records import Columns, encode_answers, read_records, to_messages

SET_FILES = {"train.safetensors", "val.safetensors", "meta.json", CHECKSUMS}


def fetch(url: str, file: Path) -> Path:
    """Download a file unless it is there already; it gets its name only once it is complete.

    Raises:
        UserError: no connection, or fewer bytes came than the server announced.
    """
    if file.is_file():
        return file
    try:
        with (
            replacing(file) as temporary,
            urllib.request.urlopen(url, timeout=60) as response,  # noqa: S310 addresses of ours, checked below
            temporary.open("wb") as out,
        ):
            check_secure(response.url)  # where it was sent on to
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, desc=file.name, unit="B", unit_scale=True, disable=None) as bar:
                while chunk := response.read(1 << 20):
                    out.write(chunk)
                    bar.update(len(chunk))
            if out.tell() < size:
                raise UserError(f"{url}: broke off after {out.tell()} of {size} bytes. Run this again")
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: cannot be downloaded ({error}). Get it by hand and give it with --source") from None
    return file


@dataclass
class PrepareArgs:
    """How records become samples.

    Args:
        checkpoint_dir: the model folder whose tokenizer is used.
        data_dir: where the prepared set goes; one that is there already is replaced.
        val_size: records held out for validation.
        max_seq_length: longest sample in tokens; longer ones are cut.
        template: prompt template: alpaca, chatml, llama3, chat (the model folder's own) or none.
        mask_prompt: learn the response only; false: learn the prompt as well.
        seed: of the split into training and validation records.
    """

    checkpoint_dir: Path
    data_dir: Path
    val_size: int = 2000
    max_seq_length: int = 512
    template: str = "alpaca"
    mask_prompt: bool = True
    seed: int = 42


def prepare(records: list[Any], source: Path, args: PrepareArgs, columns: Columns | None = None) -> dict[str, Any]:
    """Tokenize records into a prepared set: `train.safetensors`, `val.safetensors` and `meta.json`.

    A sample is the prompt, the response and the end token. A conversation with several answers gives one sample for
    each. Samples over `max_seq_length` are cut at their end; a sample whose prompt leaves no room for a single
    response token is dropped. Both are counted in `meta.json` and printed.

    Returns:
        what `meta.json` holds.

    Raises:
        UserError: a record or argument is wrong. Nothing is written then.
    """
    columns = columns or Columns()
    if not 0 <= args.val_size < len(records):
        raise UserError(
            f"--val_size {args.val_size}: should be from 0 to {len(records) - 1}, the records are {len(records)}"
        )
    if args.max_seq_length < 2:
        raise UserError(f"--max_seq_length {args.max_seq_length}: should be at least 2")
    there = {path.name for path in args.data_dir.iterdir()} if args.data_dir.is_dir() else set()
    if "meta.json" not in there:
        check_new_folder(args.data_dir)
    elif surplus := there - SET_FILES:  # only a prepared set is replaced
        hint = "Move it away, or give another --data_dir"
        raise UserError(f"{args.data_dir}: exists already, and holds {min(surplus)}, which would be lost. {hint}")
    tokenizer = Tokenizer(args.checkpoint_dir)
    config = LLaMAConfig.from_checkpoint(args.checkpoint_dir)
    template = get_template(args.template, tokenizer)
    end_id = stop_ids(template, tokenizer, config.eos_token_id)[0]

    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = set(order[: args.val_size])
    train, val = _SetWriter(), _SetWriter()
    counts = dict(records=len(records), train_samples=0, val_samples=0, cut_samples=0, dropped_samples=0)
    for number, record in enumerate(tqdm(records, desc="tokenizing", unit="records", disable=None)):
        place = f"{source}, record {number + 1}"
        messages = to_messages(record, columns, place)
        for prompt, response in encode_answers(messages, template, tokenizer, end_id, place):
            ids = (prompt + response)[: args.max_seq_length]
            if len(prompt) >= args.max_seq_length or len(ids) < 2:  # the first token is never predicted
                counts["dropped_samples"] += 1
                continue
            counts["cut_samples"] += len(prompt) + len(response) > args.max_seq_length
            (val if number in held_out else train).add(ids, len(prompt) if args.mask_prompt else 0)
    counts |= dict(train_samples=len(train), val_samples=len(val), train_tokens=len(train.tokens))
    if not len(train):
        raise UserError(f"{source}: no sample is left to train on; raise --max_seq_length {args.max_seq_length}")
    meta = dict(
        source=str(source),
        sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
        **counts,
        tokenizer_sha256=tokenizer.sha256,
        template=args.template,
        max_seq_length=args.max_seq_length,
        mask_prompt=args.mask_prompt,
        val_size=args.val_size,
        seed=args.seed,
    )
    with replacing(args.data_dir) as folder:
        folder.mkdir()
        train.save(folder / "train.safetensors")
        val.save(folder / "val.safetensors")
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", "utf-8")
        write_checksums(folder)
    print(
        f"{args.data_dir}: {len(train)} samples to train, {len(val)} to validate; "
        f"{counts['cut_samples']} cut at {args.max_seq_length} tokens, "
        f"{counts['dropped_samples']} dropped for want of room for a response"
    )
    return meta


class _SetWriter:
    """Collects samples as flat token ids."""

    def __init__(self) -> None:
        self.tokens, self.offsets, self.prompt_lengths = array("i"), array("q", [0]), array("i")

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def add(self, ids: list[int], prompt_length: int) -> None:
        self.tokens.extend(ids)
        self.offsets.append(len(self.tokens))
        self.prompt_lengths.append(prompt_length)

    def save(self, file: Path) -> None:
        parts = dict(tokens=self.tokens, offsets=self.offsets, prompt_lengths=self.prompt_lengths)
        save_tensors({name: torch.from_numpy(np.array(values)) for name, values in parts.items()}, file)


def main(
    source: Path,
    checkpoint_dir: Path = Path("checkpoints/meta-llama/Llama-2-7b-hf"),
    data_dir: Path = Path("data/mine"),
    val_size: int = 100,
    max_seq_length: int = 512,
    template: str = "alpaca",
    mask_prompt: bool = True,
    seed: int = 42,
    columns: Columns = Columns(),
) -> None:
    """Prepare your own JSON, JSONL or CSV for finetuning. Guide: howto/prepare_data.md

    Example:
        python scripts/prepare_json.py --source my.csv --columns.instruction question --columns.output answer

    Args:
        source: .json (an array), .jsonl (an object a line) or .csv; records have columns, or a list of `messages`.
        checkpoint_dir: the model folder whose tokenizer is used.
        data_dir: where the prepared set goes.
        val_size: records held out for validation.
        max_seq_length: longest sample in tokens; longer ones are cut.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none.
        mask_prompt: learn the response only; false: learn the prompt as well.
        seed: of the split into training and validation records.
        columns: what the columns are called.
    """
    args = PrepareArgs(checkpoint_dir, data_dir, val_size, max_seq_length, template, mask_prompt, seed)
    prepare(read_records(source), source, args, columns)


if __name__ == "__main__":
    run(main)
