"""Instruction records: JSON, JSONL and CSV files to conversations, and these to token ids."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError
from lit_llama.prompts import Messages, Template, encode_prompt
from lit_llama.tokenizer import Tokenizer


@dataclass
class Columns:
    """Names of a record's fields.

    Args:
        instruction: Task or question.
        input: Further context; may be missing or empty.
        output: Answer to learn.
    """

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"


def read_records(source: Path) -> list[Any]:
    """Read a JSON array (.json), a JSON object per line (.jsonl) or a CSV file with a header."""
    from lit_llama.storage.files import read_text  # imports torch: not before flags are read

    text = read_text(source, ". Pass a file with --source")
    csv.field_size_limit(sys.maxsize)  # default: 128 kB
    records, lines_read = [], 0
    try:
        if source.suffix == ".csv":
            rows = csv.DictReader(io.StringIO(text), strict=True)
            lines_read = 1  # the header
            for record in rows:
                if None in record or None in record.values():
                    raise csv.Error("not as many fields as the header. Quote fields with a comma")
                records.append(record)
                lines_read = rows.line_num
        elif source.suffix == ".jsonl":
            for line in text.split("\n"):
                records += [json.loads(line)] if line.strip() else []
                lines_read += 1
        elif source.suffix == ".json":
            records = json.loads(text)
    except (csv.Error, json.JSONDecodeError) as error:
        line = lines_read + getattr(error, "lineno", 1)
        raise UserError(f"{source}, line {line}: malformed ({error})") from None
    if not isinstance(records, list) or not records or not isinstance(records[0], dict):
        raise UserError(f"{source}: holds no records. Pass a .json (an array), .jsonl or .csv file")
    return records


def to_messages(record: Any, columns: Columns, where: str) -> Messages:
    """Return a record as a conversation with an answer to learn."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: should be an object, not {type(record).__name__}")
    turns = record.get("messages")
    if turns is None or columns.instruction in record:
        for name in (columns.instruction, columns.output):
            if name not in record:
                hint = f"found: {', '.join(record)}. Name the columns with --columns.*"
                raise UserError(f"{where}: no column {name!r}, {hint}")
        user = {"role": "user", "content": record[columns.instruction]}
        user["input"] = record.get(columns.input) or ""
        turns = [user, {"role": "assistant", "content": record[columns.output]}]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: `messages` should be a list of objects")
    roles = [turn.get("role") for turn in turns]
    texts = [text for turn in turns for text in (turn.get("content"), turn.get("input", ""))]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: instruction, input, output and content should be text")
    if not all(role in ("system", "user", "assistant") for role in roles):
        raise UserError(f"{where}: the roles are system, user and assistant, not {roles}")
    if "assistant" not in roles or roles[0] == "assistant":
        raise UserError(f"{where}: `messages` should hold an assistant's answer to something")
    return turns


def read_conversations(source: Path, columns: Columns) -> dict[str, Messages]:
    """Read all records of a file as conversations, by their location in it."""
    records = {f"{source}, record {n}": r for n, r in enumerate(read_records(source), start=1)}
    return {where: to_messages(record, columns, where) for where, record in records.items()}


def encode_answers(
    messages: Messages, template: Template, tokenizer: Tokenizer, end_id: int, where: str
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the token ids of prompt and response, with the end token, of each answer."""
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            try:
                prompt = encode_prompt(template, tokenizer, messages[:turn])
                response = tokenizer.encode(message["content"], bos=False)
            except (UserError, UnicodeEncodeError) as error:
                raise UserError(f"{where}: {error}") from None
            yield prompt, [*response, end_id]
