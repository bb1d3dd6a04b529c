"""Prepare your own JSON, JSONL or CSV for finetuning. Guide: howto/prepare_data.md

The other prepare scripts are this one with another source and other column names.
"""

import csv
import hashlib
import http.client
import io
import json
import sys
import urllib.request
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lit_llama import LLaMAConfig, Tokenizer, UserError
from lit_llama.cli import run
from lit_llama.files import check_new_folder, replacing, save_tensors
from lit_llama.prompts import Messages, encode_prompt, get_template, stop_ids


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
            urllib.request.urlopen(url, timeout=60) as response,
            temporary.open("wb") as out,
        ):
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


SURPLUS = "fields without a name"


@dataclass
class Columns:
    """Which fields of a record hold what.

    Args:
        instruction: the task or question.
        input: further context, may be absent or empty in a record.
        output: the answer to learn.
    """

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"


def read_records(source: Path) -> list[dict[str, Any]]:
    """The records of a JSON array (`.json`), JSON objects a line (`.jsonl`) or a CSV with a header (`.csv`), UTF-8.

    Raises:
        UserError: the file is missing, empty or malformed; the message has the line.
    """
    try:
        text = source.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 (byte {error.start}). Save it as UTF-8 first") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}). Give a file with --source") from None
    if not text.strip():
        raise UserError(f"{source}: the file is empty")
    if source.suffix == ".csv":
        csv.field_size_limit(sys.maxsize)
        rows = csv.DictReader(io.StringIO(text, newline=""), restkey=SURPLUS, strict=True)
        records: Any = []
        try:
            for record in rows:
                if SURPLUS in record or None in record.values():
                    found = "more" if SURPLUS in record else "fewer"
                    hint = "Quote fields that hold a comma"
                    raise UserError(f"{source}, line {rows.line_num}: {found} fields than the header has. {hint}")
                records.append(record)
        except csv.Error as error:
            raise UserError(f"{source}, line {rows.line_num + 1}: malformed CSV ({error})") from None
    elif source.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)
        records = [_parse_json(line, source, number) for number, line in lines if line.strip()]
    elif source.suffix == ".json":
        records = _parse_json(text, source, 1)
    else:
        raise UserError(f"{source}: unknown kind of file. Known: .json (an array), .jsonl (an object a line), .csv")
    if not isinstance(records, list) or not records:
        raise UserError(f"{source}: should hold an array of records, with at least one in it")
    return records


def _parse_json(text: str, source: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{source}, line {line}, column {error.colno}: malformed JSON ({error.msg})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits
        raise UserError(f"{source}, line {first_line}: JSON that cannot be read ({error})") from None


def to_messages(record: Any, columns: Columns, place: str) -> Messages:
    """A record as a conversation that ends with the answer to learn.

    Raises:
        UserError: a column is missing or holds something other than text.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place}: should be an object, is {type(record).__name__}")
    if "messages" in record and columns.instruction not in record:
        messages = record["messages"]
        good = isinstance(messages, list) and all(
            isinstance(m, dict)
            and isinstance(m.get("content"), str)
            and isinstance(m.get("input", ""), str)
            and m.get("role") in ("system", "user", "assistant")
            for m in messages
        )
        if not good or not any(m["role"] == "assistant" for m in messages) or messages[0]["role"] == "assistant":
            raise UserError(
                f"{place}: `messages` should be a list of {{role: system|user|assistant, content: text}} "
                "with an assistant's answer to something before it"
            )
        return messages
    for column in (columns.instruction, columns.output):
        if column not in record:
            found = ", ".join(map(str, record)) or "none"
            raise UserError(f"{place}: no column {column!r}, found: {found}. Name the columns with --columns.*")
    values = [record[columns.instruction], record.get(columns.input) or "", record[columns.output]]
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"{place}: instruction, input and output should be text")
    user = {"role": "user", "content": values[0], "input": values[1]}
    return [user, {"role": "assistant", "content": values[2]}]


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
    if not (args.data_dir / "meta.json").is_file():  # only a prepared set may be replaced
        check_new_folder(args.data_dir)
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
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                prompt = encode_prompt(template, tokenizer, messages[:turn])
                response = [*tokenizer.encode(message["content"], bos=False), end_id]
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
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
