"""Records from the files that people have, as conversations: JSON, CSV and Parquet."""

import csv
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import IO, Any

from lit_llama.errors import UserError
from lit_llama.prompts import Messages

COMPRESSED = {".gz", ".bz2", ".zst"}
SUFFIXES = {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"}
# beside the records, of the `datasets` library
ABOUT_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# files that are something else, by how they start
OTHER_FILES = {b"PK\x03\x04": "an Excel or ZIP file. Save it as CSV, or unpack it"}
OTHER_FILES |= dict.fromkeys(
    (b"ARRO", b"\xff\xff\xff\xff"), "an Arrow file. Write it with to_parquet or to_json"
)
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
ROLES |= {"chatgpt": "assistant", "developer": "system", "ipython": "tool"}
ROLES |= {"function_call": "assistant", "function": "tool", "observation": "tool"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
CONVERSATIONS = ("conversations", "conversation")  # common names beside `messages`
CHUNK = 1 << 20  # characters
EMPTY = (None, "", [], "[]")


@dataclass
class Columns:
    """Names of a record's fields.

    Args:
        instruction: Task or question; else `prompt`, or `input` if there is neither.
        input: Further context; may be missing or empty.
        output: Answer to learn; else `completion`.
        system: System message; may be missing or empty.
        history: Earlier [question, answer] pairs; may be missing or empty.
        messages: Turns of a conversation; else `conversations`.
        role: Who speaks, in a turn; else `from`.
        content: What is said, in a turn; else `value`.
        text: Plain text, of which all is learned.
    """

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    system: str = "system"
    history: str = "history"
    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    text: str = "text"


def source_files(source: Path) -> list[Path]:
    """Return the files of a source: itself, or all files of records in a folder."""
    if not source.is_dir():
        return [source]
    paths = [path.relative_to(source) for path in source.rglob("*")]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    found = sorted(source / path for path in paths if is_records_file(path.name))
    if not found:
        raise UserError(f"{source}: holds no records ({', '.join(sorted(SUFFIXES))})")
    return found


def is_records_file(name: str) -> bool:
    """Check the end of a file's name, such as `.jsonl` or `.csv.gz`."""
    path = Path(name.lower())
    path = path.with_suffix("") if path.suffix in COMPRESSED else path
    return path.suffix in SUFFIXES and path.name not in ABOUT_FILES


def read_records(source: Path) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file or folder, each with its location, one at a time.

    The content tells the format: a JSON array or JSON objects that follow each other (a line each,
    or not), a CSV file with a header, or Parquet; compressed or not.
    """
    empty = True
    for file in source_files(source):
        try:
            for number, record in enumerate(_read_file(file), start=1):
                empty = False
                yield f"{file}, record {number}", record
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 ({error.reason}). Save it as UTF-8") from None
        except (ValueError, OverflowError, RecursionError) as error:
            # such as a date out of range, a number of thousands of digits, very deep nesting
            raise UserError(f"{file}: malformed ({error})") from None
        except (EOFError, zlib.error) as error:
            raise UserError(f"{file}: cannot be unpacked ({error}). Download it again") from None
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error})"
            raise UserError(f"{file}: {problem}. Pass a file with --source") from None
    if empty:
        raise UserError(f"{source}: holds no records. Pass JSON, JSONL, CSV or Parquet")


def _read_file(file: Path) -> Iterator[Any]:
    with _open(file) as handle:
        start = handle.peek(4)[:4]
        if start in OTHER_FILES:
            raise UserError(f"{file}: {OTHER_FILES[start]}")
        if start == b"PAR1":
            yield from _read_parquet(file)
            return
        # Excel and PowerShell write UTF-16, with a mark at the start
        encoding = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = io.TextIOWrapper(handle, encoding, newline="")
        head = text.read(CHUNK)
        if head.startswith("version https://git-lfs"):
            raise UserError(f"{file}: a pointer of Git LFS, not the file. Run git lfs pull")
        is_table = {"csv", "tsv"} & set(file.name.lower().split("."))
        if head.lstrip()[:1] in ("[", "{") or not is_table:
            yield from _read_json(text, head, file)
            return
    with _open(file) as handle:
        yield from _read_csv(io.TextIOWrapper(handle, encoding, newline=""), file)


def _open(file: Path) -> IO[bytes]:
    """Open a file, which may be compressed."""
    with file.open("rb") as handle:
        start = handle.read(4)
    if start[:2] == b"\x1f\x8b":
        import gzip

        return io.BufferedReader(gzip.open(file))
    if start[:3] == b"BZh":
        import bz2

        return io.BufferedReader(bz2.open(file))
    if start == b"\x28\xb5\x2f\xfd":
        return io.BufferedReader(_pyarrow(file).CompressedInputStream(str(file), "zstd"))
    return file.open("rb")


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow.parquet

        return pyarrow
    except ImportError:
        fix = "pip install -c constraints.txt -e '.[parquet]'"
        raise UserError(f"{file}: reading it needs pyarrow: {fix}") from None


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    pyarrow = _pyarrow(file)
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1000):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: malformed ({error}). Download it again") from None


def _read_json(handle: IO[str], buffer: str, file: Path) -> Iterator[Any]:
    """Yield the values of a JSON array, or those that follow each other; `buffer` is the start."""
    # pandas writes NaN where a cell was empty
    decoder = json.JSONDecoder(parse_constant=lambda name: None)
    space = re.compile(r"[\s,]*")
    start, line, in_array, size = 0, 1, False, CHUNK
    while True:
        start = space.match(buffer, start).end()
        if buffer[start : start + 1] == ("]" if in_array else "["):
            in_array = not in_array
            start += 1
            continue
        try:
            value, end = decoder.raw_decode(buffer, start)
            # a number could go on
            if end < len(buffer) or not (more := handle.read(size)):
                start, size = end, CHUNK
                yield value
                continue
        except json.JSONDecodeError as error:
            # does the value go on behind the buffer? A string's error is at its start
            cut = error.pos > len(buffer) - 20 or error.msg.startswith("Unterminated")
            more = handle.read(size) if cut else ""
            if not more:
                if start == len(buffer) and not in_array:
                    return
                line += buffer.count("\n", 0, error.pos)
                hint = "" if is_records_file(file.name) else '. A text goes into {"text": "..."}'
                raise UserError(f"{file}, line {line}: malformed ({error.msg}){hint}") from None
        line += buffer.count("\n", 0, start)
        buffer, start, size = buffer[start:] + more, 0, 2 * size


def _read_csv(lines: IO[str], file: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)  # default: 128 kB
    header = lines.readline()
    if header.startswith("sep="):  # as Excel writes it
        header = lines.readline()
    # Excel separates by semicolons where a comma is the decimal point
    delimiter = max(",;\t", key=header.count)
    rows = csv.DictReader(chain([header], lines), delimiter=delimiter, strict=True)
    line = 0
    try:
        names = [name.strip() for name in rows.fieldnames or []]
        if twice := [name for name in names if name and names.count(name) > 1]:
            raise csv.Error(f"two columns are called {twice[0]!r}")
        rows.fieldnames = names
        line = 1
        for record in rows:
            if None in record or None in record.values():
                raise csv.Error("not as many fields as the header. Quote fields with a comma")
            yield record
            line = rows.line_num
    except csv.Error as error:
        raise UserError(f"{file}, line {line + 1}: malformed ({error})") from None


def to_messages(
    record: Any, columns: Columns, where: str, used: set[str] | None = None
) -> Messages:
    """Return a record as a conversation; a plain text is one turn with the role "text".

    Turns that must not be learned have `learn: False`. Adds the names of the columns that are read
    to `used`. Raises UserError if the record holds no conversation.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: is {_show(record)}, expected an object")
    reader = _Reader(record, columns, where, set() if used is None else used)
    is_named = (columns.instruction, columns.output) != ("instruction", "output")
    pairs = _pairs(record, columns)
    places = [columns.messages, *(CONVERSATIONS if columns.messages == "messages" else ())]
    places = [name for name in places if name in record]
    # a table has all columns in all records, empty where another format is used
    turns = [name for name in places if record[name] not in EMPTY]
    filled = [pair for pair in pairs if any(record[name] not in EMPTY for name in pair)]
    if columns.text in record and columns.text != "text":
        return [{"role": "text", "content": reader.string(columns.text)}]
    if turns and not (is_named and filled):
        return reader.conversation(turns[0])
    if pairs and (filled or columns.text not in record):
        return reader.system() + reader.answer(*(filled or pairs)[0])
    if columns.text in record and not is_named:
        return [{"role": "text", "content": reader.string(columns.text)}]
    if places:
        return []  # an empty conversation
    missing = [name for name in (columns.instruction, columns.output) if name not in record]
    problem = f"no column {(missing or ['input'])[0]!r}, found: {', '.join(record)}"
    raise UserError(f"{where}: {problem}. {reader.hint()}")


def _pairs(record: dict, columns: Columns) -> list[tuple[str, str]]:
    """Return the columns of question and answer that a record has, the likeliest ones first."""
    questions = [columns.instruction]
    questions += ["prompt"] if columns.instruction == "instruction" else []
    answers = [columns.output]
    answers += ["completion"] if columns.output == "output" else []
    pairs = [*zip(questions, answers, strict=False), *product(questions, answers)]
    # the input may be the question, if nothing else is
    others = {*questions, "completion", columns.text} - {columns.system}
    if len(questions) == len(answers) == 2 and all(record.get(n) in EMPTY for n in others):
        pairs.append(("input", "output"))
    return [pair for pair in pairs if record.keys() >= {*pair} and columns.system not in pair]


class _Reader:
    """The fields of one record."""

    def __init__(self, record: dict, columns: Columns, where: str, used: set[str]) -> None:
        self.record, self.columns, self.where, self.used = record, columns, where, used

    def fail(self, field: str, value: Any, expected: str) -> UserError:
        return UserError(f"{self.where}: {field} is {_show(value)}, expected {expected}")

    def hint(self) -> str:
        """Return what to do about a record without the columns that are looked for."""
        if self.is_turn(self.record):
            return f"Put the turns of a conversation into a list {self.columns.messages!r}"
        hint = "Name the columns with --columns.*"
        for name, value in self.record.items():
            first = value[0] if isinstance(value, list) and value else None
            if isinstance(first, dict) and not self.is_turn(first):
                return f"{hint}, or put the records of {name!r} into a file of their own"
        return hint

    def get(self, name: str) -> Any:
        self.used.add(name)
        return self.record.get(name)

    def string(self, name: str) -> str:
        """Return a text; "" if it is missing or null, as pandas and Parquet have empty cells."""
        value = self.get(name)
        return "" if value is None else self.text(value, name)

    def text(self, value: Any, field: str) -> str:
        """Return a text, which may be a list of parts: {"type": "text", "text": "..."}."""
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            texts = [part.get("text") for part in value if part.get("type", "text") == "text"]
            if len(texts) == len(value) and all(isinstance(text, str) for text in texts):
                value = "".join(texts)
        if not isinstance(value, str):
            raise self.fail(field, value, "text")
        try:
            value.encode()
        except UnicodeEncodeError:  # half of an emoji
            raise self.fail(field, value, "valid Unicode") from None
        return value

    def list(self, name: str) -> list[Any]:
        value = self.get(name)
        if isinstance(value, str) and value.lstrip().startswith("["):  # in a CSV file
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise self.fail(name, value, f"JSON ({error})") from None
        if not isinstance(value, list):
            raise self.fail(name, value, "a list")
        return value

    def system(self) -> Messages:
        text = self.string(self.columns.system)
        return [{"role": "system", "content": text}] if text else []

    def conversation(self, name: str) -> Messages:
        """Return the turns of a conversation, after the system message."""
        turns, system = self.turns(name), self.system()
        if system and turns and turns[0]["role"] == "system":
            if turns[0]["content"].strip() != system[0]["content"].strip():
                expected = f"that of {name}[0], or none"
                raise self.fail(self.columns.system, system[0]["content"], expected)
            return turns
        return system + turns

    def answer(self, instruction: str, output: str) -> Messages:
        """Return a question and its answer, after the history. Both may be lists of turns."""
        messages: Messages = []
        history = self.columns.history
        for number, pair in enumerate(self.list(history) if self.get(history) else []):
            field = f"{history}[{number}]"
            if not isinstance(pair, list) or len(pair) != 2:
                raise self.fail(field, pair, "a pair [question, answer]")
            question, answer = (self.text(text, f"{field}[{n}]") for n, text in enumerate(pair))
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        if self.has_turns(instruction):
            # only what completes the prompt is learned
            messages += [turn | {"learn": False} for turn in self.turns(instruction)]
        else:
            user = {"role": "user", "content": self.string(instruction)}
            name = self.columns.input
            is_other = name not in (instruction, output, self.columns.system)
            if is_other and (context := self.string(name)):
                user["input"] = context
            messages.append(user)
        if self.has_turns(output):
            turns = self.turns(output)
            first = turns[0] if turns else {}
            # preference data has the question here, too
            if messages and first.get("role") == "user" and first.items() <= messages[-1].items():
                turns = turns[1:]
            return messages + turns
        return [*messages, {"role": "assistant", "content": self.string(output)}]

    def has_turns(self, name: str) -> bool:
        """Check for a list of turns, in a CSV file as JSON."""
        value = self.record[name]
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return re.match(r'\s*\[\s*{\s*"role"', value) is not None  # cut off, say
            # an answer may be JSON as well: [{"from": "Berlin", "to": "Bonn"}]
            return bool(value) and all(map(self.is_turn, value))
        return isinstance(value, list)

    def is_turn(self, value: Any) -> bool:
        says = (self.columns.content, "value", "tool_calls", "function_call")
        keys = (self.columns.role, "from"), says
        return isinstance(value, dict) and all(value.keys() & set(names) for names in keys)

    def turns(self, name: str) -> Messages:
        """Return the turns of a conversation, in any of the common spellings."""
        turns = self.list(name)
        return [self.turn(turn, f"{name}[{number}]") for number, turn in enumerate(turns)]

    def turn(self, turn: Any, field: str) -> dict[str, Any]:
        if not isinstance(turn, dict):
            raise self.fail(field, turn, "an object with role and content")

        def pick(*names: str) -> str | None:
            # Parquet has all keys in all turns, null where the others are used
            found = [name for name in names if name in turn]
            return next((n for n in found if turn[n] is not None), next(iter(found), None))

        role_key = pick(self.columns.role, "from")
        content_key = pick(self.columns.content, "value")
        if content_key is None and (turn.get("tool_calls") or turn.get("function_call")):
            turn, content_key = turn | {"content": ""}, "content"
        if role_key is None or content_key is None:
            hint = "role and content. Name them with --columns.role, --columns.content"
            raise self.fail(field, turn, hint)
        role = turn[role_key]
        known = ROLES.get(role.lower()) if isinstance(role, str) else None
        if known is None:
            raise self.fail(f"{field}.{role_key}", role, "system, user, assistant or tool")
        own = (role_key, content_key, "learn")  # the last one is ours
        rest = {k: v for k, v in turn.items() if k not in own and v is not None}
        content = "" if turn[content_key] is None else turn[content_key]
        message = {"role": known, "content": self.text(content, f"{field}.{content_key}")}
        for key in ("weight", "train"):
            if key in rest:
                value = rest.pop(key)
                if value not in (0, 1):
                    raise self.fail(f"{field}.{key}", value, "0, 1, true or false")
                if not value:
                    message["learn"] = False
        if rest:
            try:
                json.dumps(rest, ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError:
                raise self.fail(field, turn, "valid Unicode") from None
        return rest | message


def _show(value: Any) -> str:
    """Return a value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_conversations(source: Path, columns: Columns) -> dict[str, Messages]:
    """Read all records of a file as conversations, by their location in it."""
    return {where: to_messages(r, columns, where) for where, r in read_records(source)}
