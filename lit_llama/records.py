"""Records of instructions and answers: read from JSON, JSONL and CSV, as conversations, as token ids."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError
from lit_llama.files import read_text
from lit_llama.prompts import Messages, Template, encode_prompt
from lit_llama.tokenizer import Tokenizer

SURPLUS = "fields without a name"
MAX_FIELD = 2_000_000  # characters: tokenizing takes seconds and GBs for ten times as many


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

    def __post_init__(self) -> None:
        names = [self.instruction, self.input, self.output]
        if len(set(names)) < 3:
            raise UserError(f"--columns.*: instruction, input and output should be three columns, not {names}")


def read_records(source: Path) -> list[dict[str, Any]]:
    """The records of a JSON array (`.json`), JSON objects a line (`.jsonl`) or a CSV with a header (`.csv`), UTF-8.

    Raises:
        UserError: the file is missing, empty or malformed; the message has the line.
    """
    text = read_text(source, hint=". Give a file with --source")
    if not text.strip():
        raise UserError(f"{source}: the file is empty")
    if source.suffix == ".csv":
        csv.field_size_limit(sys.maxsize)
        rows = csv.DictReader(io.StringIO(text, newline=""), restkey=SURPLUS, strict=True)
        records: Any = []
        try:
            names = [name for name in rows.fieldnames or [] if name]  # a table's index, or empty columns, have none
            if not names or len(set(names)) < len(names):
                raise UserError(f"{source}, line 1: should name the columns, and none twice: {', '.join(names)}")
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
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{source}, line {line}, column {error.colno}: malformed JSON ({error.msg})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits
        raise UserError(f"{source}, line {first_line}: JSON that cannot be read ({error})") from None


class _Ambiguous(dict):
    """A JSON object with a key more than once."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return (dict if len(whole := dict(pairs)) == len(pairs) else _Ambiguous)(whole)


def to_messages(record: Any, columns: Columns, place: str) -> Messages:
    """A record as a conversation that ends with the answer to learn.

    Raises:
        UserError: a column is missing or holds something other than text.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place}: should be an object, is {type(record).__name__}")
    turns = record.get("messages")
    for part in (record, *(turns if isinstance(turns, list) else [])):
        if isinstance(part, _Ambiguous):
            raise UserError(f"{place}: a key is there twice in it, one of {', '.join(part)}")
    if "messages" in record and columns.instruction not in record:
        good = isinstance(turns, list) and all(
            isinstance(m, dict)
            and isinstance(m.get("content"), str)
            and isinstance(m.get("input", ""), str)
            and m.get("role") in ("system", "user", "assistant")
            for m in turns
        )
        if not good or not any(m["role"] == "assistant" for m in turns) or turns[0]["role"] == "assistant":
            raise UserError(
                f"{place}: `messages` should be a list of {{role: system|user|assistant, content: text}} "
                "with an assistant's answer to something before it"
            )
        for turn in turns:
            check_length(turn["content"] + turn.get("input", ""), place)
        return turns
    for column in (columns.instruction, columns.output):
        if column not in record:
            found = ", ".join(map(str, record)) or "none"
            raise UserError(f"{place}: no column {column!r}, found: {found}. Name the columns with --columns.*")
    values = [record[columns.instruction], record.get(columns.input) or "", record[columns.output]]
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"{place}: instruction, input and output should be text")
    for value in values:
        check_length(value, place)
    user = {"role": "user", "content": values[0], "input": values[1]}
    return [user, {"role": "assistant", "content": values[2]}]


def check_length(text: str, place: str) -> None:
    """Raise UserError for a text that takes long to tokenize and is of no use to any model."""
    if len(text) > MAX_FIELD:
        raise UserError(f"{place}: a text of {len(text):,} characters, more than any context holds. Cut it")


def read_conversations(source: Path, columns: Columns) -> dict[str, Messages]:
    """All records of a file as conversations, by their place in it. Raises UserError as `to_messages` does."""
    places = {f"{source}, record {number}": record for number, record in enumerate(read_records(source), start=1)}
    return {place: to_messages(record, columns, place) for place, record in places.items()}


def encode_answers(
    messages: Messages, template: Template, tokenizer: Tokenizer, end_id: int, place: str
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of the prompt, and of the response with the end token, for each answer of a conversation.

    Raises UserError, with `place` in front, for what the template cannot hold and for text that is no valid Unicode.
    """
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            try:
                prompt = encode_prompt(template, tokenizer, messages[:turn])
                response = [*tokenizer.encode(message["content"], bos=False), end_id]
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
            yield prompt, response
