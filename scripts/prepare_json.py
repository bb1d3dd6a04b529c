"""Prepare your own records for finetuning. Guide: howto/prepare_data.md

The other prepare scripts are this one with another source and other column names.
"""

import hashlib
import http.client
import json
import random
import re
import shutil
import sys
import urllib.request
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import NonNegativeInt, PositiveInt
from tqdm import tqdm

from lit_llama.errors import UserError
from lit_llama.runtime.cli import run
from lit_llama.storage.records import (
    Columns,
    is_records_file,
    read_records,
    source_files,
    to_messages,
)

if TYPE_CHECKING:
    from lit_llama.storage.samples import Span, Text, TextBatch
    from lit_llama.tokenizer import Tokenizer

FILES = {"train.safetensors", "val.safetensors", "meta.json", "checksums.txt"}
TURN_KEYS = {"role", "content", "input", "learn"}
BATCH = 1000  # records that are in memory at once
AHEAD = 2  # batches that are being encoded while others are read and written
SHOWN = 5  # records to name in a remark
# type code of `array` and safetensors' name of each tensor; the largest types come first, so that
# all are aligned
DTYPES = {"offsets": "q I64", "tokens": "i I32", "label_counts": "i I32", "is_label": "B BOOL"}


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
    val_size: int | None
    max_seq_length: int
    template: str
    mask_prompt: bool
    seed: int


def check_data_dir(data_dir: Path) -> None:
    """Raise UserError unless `data_dir` is missing, empty, or a dataset, which is then replaced."""
    found = {path.name for path in data_dir.iterdir()} if data_dir.exists() else set()
    if found and ("meta.json" not in found or found - FILES):
        hint = "Move it away, or pass another --data_dir"
        name = min(found - FILES, default="files")
        raise UserError(f"{data_dir}: exists already, and holds {name}. {hint}")


def prepare(
    source: Path,
    args: PrepareArgs,
    columns: Columns = Columns(),
    num_records: int | None = None,
) -> dict[str, Any]:
    """Tokenize records and write `train.safetensors`, `val.safetensors` and `meta.json`.

    A sample is a conversation: prompts, answers and their end tokens. Samples longer than
    `max_seq_length` are truncated at the end. Records are streamed: few are in memory at once.

    Args:
        num_records: Number of records that a download should have.

    Returns:
        Content of meta.json.
    """
    check_data_dir(args.data_dir)
    if len(files := source_files(source)) > 1:
        print(f"{source}: {', '.join(str(file.relative_to(source)) for file in files)}")
    count = sum(1 for _ in read_records(source))
    if num_records not in (None, count):
        problem = f"holds {count} records instead of {num_records}"
        raise UserError(f"{source}: {problem}. Delete it and run this again")
    val_size = min(2000, count // 10) if args.val_size is None else args.val_size
    if val_size >= count:
        problem = f"should be less than the number of records, {count}"
        raise UserError(f"--val_size {val_size}: {problem}")
    held_out = set(random.Random(args.seed).sample(range(count), val_size))  # noqa: S311 no secret

    # imported after the flags are read, so that --help is fast; none of these needs torch
    from lit_llama.storage.files import atomic_write, write_checksums
    from lit_llama.tokenizer import Tokenizer

    tokenizer = Tokenizer(args.checkpoint_dir)
    name = choose_template(args.template, tokenizer, source, columns)
    encoder = Encoder(tokenizer, name, args, columns)
    with atomic_write(args.data_dir) as folder:
        folder.mkdir()
        train, val = (SampleWriter(folder / f"{part}.safetensors") for part in ("train", "val"))
        records = tqdm(read_records(source), "tokenizing", count, unit="records", disable=None)
        for number, ids, spans in encoder.samples(records):
            (val if number in held_out else train).add(ids, spans)
        if not train.num_samples:
            reason = max(encoder.remarks, key=lambda text: encoder.remarks[text][0], default="")
            raise UserError(f"{source}: no sample is left to train on: {reason or 'all held out'}")
        train.close()
        val.close()
        meta = dict(
            source=str(source),
            sha256=[sha256(file) for file in files],
            records=count,
            train_samples=train.num_samples,
            val_samples=val.num_samples,
            cut_samples=encoder.num_cut,
            dropped_records=count - encoder.num_learned,
            train_tokens=train.num_tokens,
            special_ids=sorted(encoder.special_ids),
            tokenizer_sha256=tokenizer.sha256,
            template=name,
            max_seq_length=args.max_seq_length,
            mask_prompt=args.mask_prompt,
            val_size=val_size,
            seed=args.seed,
        )
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", "utf-8")
        write_checksums(folder)
    sizes = f"{train.num_samples} samples to train, {val.num_samples} to validate"
    print(f"{args.data_dir}: {sizes}, template {name}")
    for remark, (number, places, _) in encoder.remarks.items():
        shown = ", ".join(place.removeprefix(f"{source}, record ") for place in places)
        shown += ", ..." if number > SHOWN else ""
        print(f"{number} of {count} records: {remark} (record {shown})")
    if unused := sorted(filter(None, encoder.seen - encoder.used)):
        warn(f"columns that are not used: {', '.join(unused)}. Name others with --columns.*")
    if val.num_samples > train.num_samples:
        warn(f"more samples to validate than to train. Lower --val_size {val_size}")
    return meta


def choose_template(name: str, tokenizer: "Tokenizer", source: Path, columns: Columns) -> str:
    """Return the template that "auto" stands for; other names as they are."""
    if name != "auto":
        return name
    for where, record in read_records(source):
        messages = to_messages(record, columns, where)
        if messages and messages[0]["role"] != "text":
            return "chat" if tokenizer.chat_template else "alpaca"
    return "none"  # all of it is plain text


class Encoder:
    """Make samples of records, and note what should be told about them."""

    def __init__(
        self, tokenizer: "Tokenizer", template: str, args: PrepareArgs, columns: Columns
    ) -> None:
        from lit_llama.config import LLaMAConfig
        from lit_llama.prompts import get_template, stop_ids

        self.tokenizer, self.args, self.columns = tokenizer, args, columns
        self.template = get_template(template, tokenizer)
        self.config = LLaMAConfig.from_checkpoint(args.checkpoint_dir)
        self.end_id = stop_ids(self.template, tokenizer, self.config.eos_token_id)[0]
        self.turn_keys = tokenizer.chat_template or "" if template == "chat" else ""
        # records of each: their number, the first ones, the last one
        self.remarks: dict[str, tuple[int, list[str], str]] = {}
        self.seen: set[str] = set()  # names of columns
        self.used: set[str] = set()
        self.num_learned = self.num_cut = 0
        self.added_ids = set(tokenizer.added.values())
        self.special_ids: set[int] = set()  # those that come up

    def remark(self, text: str, where: str) -> None:
        count, places, last = self.remarks.get(text, (0, [], ""))
        if where != last:  # several samples of a record are one remark
            self.remarks[text] = (count + 1, [*places, where][:SHOWN], where)

    def samples(
        self, records: Iterable[tuple[str, Any]]
    ) -> "Iterator[tuple[int, list[int], list[Span]]]":
        """Yield each sample's record, counted from 0, its ids, and its spans to learn."""
        last = None
        with ThreadPoolExecutor(1) as pool:
            for owners, batch in self.encoded(records, pool):
                for (number, where, masked), sample in zip(owners, batch.samples(), strict=True):
                    ids, spans = self.cut(*sample, where, masked)
                    if spans:
                        self.num_learned += number != last
                        last = number
                        yield number, ids, spans

    def encoded(
        self, records: Iterable[tuple[str, Any]], pool: ThreadPoolExecutor
    ) -> "Iterator[tuple[list[tuple[int, str, bool]], TextBatch]]":
        """Yield batches of texts and the records that they belong to; `pool` encodes ahead."""
        from lit_llama.storage.samples import TextBatch

        running: deque[tuple[list[tuple[int, str, bool]], TextBatch, Future]] = deque()
        numbered, chunk = enumerate(records), True
        while chunk or running:
            if chunk := list(islice(numbered, BATCH)):
                owners, texts = [], []
                for number, (where, record) in chunk:
                    rendered, masked = self.render(record, where)
                    owners += [(number, where, masked)] * len(rendered)
                    texts += rendered
                batch = TextBatch(texts, self.tokenizer)
                running.append((owners, batch, pool.submit(batch.encode)))
            if running and (len(running) > AHEAD or not chunk):
                owners, batch, done = running.popleft()
                done.result()
                yield owners, batch

    def render(self, record: Any, where: str) -> "tuple[list[Text], bool]":
        """Return the texts of a record's samples, and whether their prompts are not learned."""
        from lit_llama.prompts import content
        from lit_llama.storage.samples import is_empty, render_samples

        messages = to_messages(record, self.columns, where, self.used)
        self.seen |= record.keys()
        for key in {key for turn in messages for key in turn} - TURN_KEYS:
            self.seen.add(f"messages.{key}")
            if re.search(rf"[.'\"]{re.escape(key)}\b", self.turn_keys):  # the template names it
                self.used.add(f"messages.{key}")
        try:
            texts = render_samples(messages, self.template, self.tokenizer, self.end_id)
        except UserError as error:
            self.remark(f"not learned, {error}", where)
            return [], True
        answers = [turn for turn in messages if turn["role"] == "assistant"]
        if any(is_empty(turn) and turn.get("learn", True) for turn in answers):
            self.remark("has an empty answer, which is not learned", where)
        if any(turn["role"] == "user" and not content(turn).strip() for turn in messages):
            self.remark("has an empty question", where)
        if len(texts) > 1:
            reason = (
                "since the template renders earlier turns in another way, or ends none by a token"
            )
            self.remark(f"a sample for each answer, {reason}", where)
        # an answer that must not be learned is not learned as a prompt either
        return texts, self.args.mask_prompt or any(not turn.get("learn", True) for turn in answers)

    def cut(
        self, ids: list[int], spans: "list[Span]", where: str, masked: bool
    ) -> "tuple[list[int], list[Span]]":
        """Truncate a sample. Returns no spans if no answer is left."""
        limit = self.args.max_seq_length
        if max(ids) >= self.config.vocab_size:
            problem = f"has token {max(ids)}, for which the model's embedding has no row"
            raise UserError(f"{where}: {problem} ({self.config.vocab_size} rows)")
        # nothing predicts the first token, so it is not a label
        kept = [(max(a, 1), min(b, limit)) for a, b in spans]
        kept = [(a, b) for a, b in kept if a < b]
        if not kept:
            hint = f"Raise --max_seq_length {limit}"
            self.remark(f"not learned, its prompt leaves no room for an answer. {hint}", where)
            return [], []
        if len(ids) > limit:
            self.num_cut += 1
            lost = ", and its last answers not learned" if len(kept) < len(spans) else ""
            self.remark(f"cut at --max_seq_length {limit} tokens{lost}", where)
        ids = ids[:limit]
        self.special_ids |= self.added_ids.intersection(ids)
        return ids, kept if masked else [(1, len(ids))]


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class SampleWriter:
    """Write samples into a safetensors file, one at a time: none of them stays in memory.

    storage/datasets.py loads it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.parts = {name: file.with_suffix(f".{name}") for name in DTYPES}
        self.handles = {name: path.open("wb") for name, path in self.parts.items()}
        self.num_samples = self.num_tokens = 0
        self._write("offsets", [0])

    def _write(self, name: str, values: list[int]) -> None:
        array(DTYPES[name][0], values).tofile(self.handles[name])

    def add(self, ids: list[int], spans: list[tuple[int, int]]) -> None:
        """Add a sample: token ids, and the spans (start, end) of those to learn."""
        is_label = [0] * len(ids)
        for start, end in spans:
            is_label[start:end] = [1] * (end - start)
        self.num_samples += 1
        self.num_tokens += len(ids)
        self._write("offsets", [self.num_tokens])
        self._write("tokens", ids)
        self._write("label_counts", [sum(is_label)])
        self._write("is_label", is_label)

    def close(self) -> None:
        """Put the tensors together: a header of JSON, then the bytes of each."""
        lengths = [self.num_samples + 1, self.num_tokens, self.num_samples, self.num_tokens]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for (name, dtype), length in zip(DTYPES.items(), lengths, strict=True):
            start, end = end, end + length * array(dtype[0]).itemsize
            entry = dict(dtype=dtype[2:], shape=[length], data_offsets=[start, end])
            header[name] = entry
        text = json.dumps(header).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        with self.file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, path in self.parts.items():
                self.handles[name].close()
                with path.open("rb") as part:
                    shutil.copyfileobj(part, out, 1 << 20)
                path.unlink()


def main(
    source: Path,
    checkpoint_dir: Path = Path("checkpoints/meta-llama/Llama-2-7b-hf"),
    data_dir: Path = Path("data/mine"),
    val_size: NonNegativeInt | None = None,
    max_seq_length: PositiveInt = 512,
    template: str = "auto",
    mask_prompt: bool = True,
    seed: int = 42,
    columns: Columns = Columns(),
) -> None:
    """Prepare your own records for finetuning. Guide: howto/prepare_data.md

    Example:
        python scripts/prepare_json.py --source my.csv --columns.instruction question

    Args:
        source: JSON, JSONL, CSV or Parquet file, a folder of them, or owner/name of a dataset on
            the Hugging Face hub.
        checkpoint_dir: Model folder whose tokenizer is used.
        data_dir: Output folder for the tokenized dataset.
        val_size: Number of records held out for validation (default: a tenth, at most 2000).
        max_seq_length: Longest sample in tokens; longer ones are truncated.
        template: alpaca, chatml, llama3, chat (the model folder's own), none, or auto: chat if the
            folder has one, else alpaca.
        mask_prompt: Learn the answers only; false: the prompts, too.
        seed: Seed of the split into training and validation records.
        columns: Names of the columns.
    """
    args = PrepareArgs(
        checkpoint_dir, data_dir, val_size, max_seq_length, template, mask_prompt, seed
    )
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)+", str(source)) and not is_records_file(source.name)
    if is_name and not source.exists():
        from hub import download_dataset

        source = download_dataset(str(source), data_dir.resolve().with_name("downloads"))
    prepare(source, args, columns)


if __name__ == "__main__":
    run(main)
