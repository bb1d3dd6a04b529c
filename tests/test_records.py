"""The formats of records that people have, each against the conversation that it stands for."""

import bz2
import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lit_llama import UserError
from lit_llama.storage import records
from lit_llama.storage.records import Columns, read_conversations, read_records, to_messages

QUESTION = {"role": "user", "content": "Is the sea calm?"}
ANSWER = {"role": "assistant", "content": "Calm as glass."}
SYSTEM = {"role": "system", "content": "You keep a lighthouse."}
TALK = [SYSTEM, QUESTION, ANSWER]
Q, A = QUESTION["content"], ANSWER["content"]
FROM = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
PARTS = [{"type": "text", "text": Q[:5]}, {"type": "text", "text": Q[5:]}]

FORMATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "instruction": ({"instruction": Q, "output": A}, [QUESTION, ANSWER]),
    "input": (
        {"instruction": Q, "input": "tonight", "output": A},
        [{**QUESTION, "input": "tonight"}, ANSWER],
    ),
    "null input": ({"instruction": Q, "input": None, "output": A}, [QUESTION, ANSWER]),
    "system and history": (
        {
            "system": SYSTEM["content"],
            "instruction": "And now?",
            "output": "Yes.",
            "history": [[Q, A]],
        },
        [*TALK, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Yes."}],
    ),
    "empty system and history": (
        {"system": "", "instruction": Q, "output": A, "history": []},
        [QUESTION, ANSWER],
    ),
    "messages": ({"messages": TALK}, TALK),
    "input and output": ({"input": Q, "output": A}, [QUESTION, ANSWER]),
    "the same system message twice": ({"messages": TALK, "system": SYSTEM["content"]}, TALK),
    "empty messages beside conversations": (
        {"messages": [], "conversations": FROM},
        [QUESTION, ANSWER],
    ),
    "empty cells beside a text": (
        {"instruction": "", "output": "", "messages": "", "text": Q},
        [{"role": "text", "content": Q}],
    ),
    "an answer in JSON": (
        {"instruction": Q, "output": '[{"from": "Berlin", "to": "Bonn"}]'},
        [QUESTION, {"role": "assistant", "content": '[{"from": "Berlin", "to": "Bonn"}]'}],
    ),
    "the question in both": (
        {"prompt": Q, "input": "tonight", "completion": [QUESTION, ANSWER]},
        [{**QUESTION, "input": "tonight"}, ANSWER],
    ),
    "structs of Parquet with the keys of two formats": (
        {"messages": [{**turn, "role": None, "content": None} for turn in FROM]},
        [QUESTION, ANSWER],
    ),
    "calls under the names of ShareGPT": (
        {
            "conversations": [
                *FROM[:1],
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "7"},
                *FROM[1:],
            ]
        },
        [
            QUESTION,
            {"role": "assistant", "content": "{}"},
            {"role": "tool", "content": "7"},
            ANSWER,
        ],
    ),
    "both pairs of keys in a turn": (
        {"messages": [{"value": 0.3, "from": "London", **turn} for turn in (QUESTION, ANSWER)]},
        [{"value": 0.3, "from": "London", **turn} for turn in (QUESTION, ANSWER)],
    ),
    "an empty conversation as text": ({"messages": "[]", "system": "Be kind."}, []),
    "prompt, input and output": (
        {"prompt": Q, "input": "tonight", "output": A},
        [{**QUESTION, "input": "tonight"}, ANSWER],
    ),
    "input and output beside a text": (
        {"text": Q, "input": Q, "output": A},
        [{"role": "text", "content": Q}],
    ),
    "a call in turns as JSON text": (
        {
            "prompt": json.dumps([QUESTION, {"role": "assistant", "tool_calls": [1]}]),
            "completion": A,
        },
        [
            {**QUESTION, "learn": False},
            {"role": "assistant", "content": "", "tool_calls": [1], "learn": False},
            ANSWER,
        ],
    ),
    "messages beside a system column": ({"messages": TALK[1:], "system": SYSTEM["content"]}, TALK),
    "ShareGPT": ({"conversations": FROM}, [QUESTION, ANSWER]),
    "ShareGPT's roles in messages": (
        {"messages": [{"role": "Human", "content": Q}, {"role": "GPT", "content": A}]},
        [QUESTION, ANSWER],
    ),
    "roles in conversations": ({"conversations": TALK}, TALK),
    "prompt and completion": ({"prompt": Q, "completion": A}, [QUESTION, ANSWER]),
    "turns in prompt and completion": (
        {"prompt": TALK[:2], "completion": TALK[2:]},
        [{**SYSTEM, "learn": False}, {**QUESTION, "learn": False}, ANSWER],
    ),
    "text": ({"text": Q}, [{"role": "text", "content": Q}]),
    "text beside an instruction": (
        {"instruction": Q, "output": A, "text": "x"},
        [QUESTION, ANSWER],
    ),
    "a prompt beside messages": ({"prompt": Q, "messages": TALK}, TALK),
    "null messages beside an instruction": (
        {"messages": None, "instruction": Q, "output": A},
        [QUESTION, ANSWER],
    ),
    "content in parts": (
        {"messages": [{"role": "user", "content": PARTS}, ANSWER]},
        [QUESTION, ANSWER],
    ),
    "messages as JSON text": ({"messages": json.dumps(TALK)}, TALK),
    "turns of a completion as JSON text": (
        {"prompt": Q, "completion": json.dumps([ANSWER], indent=1, sort_keys=True)},
        [QUESTION, ANSWER],
    ),
    "a tool call without content": (
        {"messages": [QUESTION, {"role": "assistant", "tool_calls": [1]}]},
        [QUESTION, {"role": "assistant", "content": "", "tool_calls": [1]}],
    ),
    "an empty conversation": ({"messages": []}, []),
    "null content": (
        {"messages": [QUESTION, {"role": "assistant", "content": None}]},
        [QUESTION, {"role": "assistant", "content": ""}],
    ),
    "tool turns": (
        {"messages": [QUESTION, {"role": "tool", "content": "7"}, ANSWER]},
        [QUESTION, {"role": "tool", "content": "7"}, ANSWER],
    ),
    "reasoning of an answer": (
        {"messages": [QUESTION, {**ANSWER, "reasoning_content": "hm", "name": None}]},
        [QUESTION, {**ANSWER, "reasoning_content": "hm"}],
    ),
}


@pytest.mark.parametrize(("record", "expected"), FORMATS.values(), ids=FORMATS)
def test_the_content_tells_the_format(record: dict, expected: list) -> None:
    assert to_messages(record, Columns(), "here") == expected


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("train", False), ("weight", 0.0)])
def test_turns_that_must_not_be_learned(key: str, value: Any) -> None:
    record = {"messages": [QUESTION, {**ANSWER, key: value}, QUESTION, {**ANSWER, key: 1}]}
    messages = to_messages(record, Columns(), "here")
    assert messages == [QUESTION, {**ANSWER, "learn": False}, QUESTION, ANSWER]


def test_columns_under_other_names() -> None:
    record = {"q": Q, "ctx": "tonight", "a": A, "messages": TALK, "rules": "Be kind."}
    columns = Columns(instruction="q", input="ctx", output="a", system="rules")
    kind = {"role": "system", "content": "Be kind."}
    assert to_messages(record, columns, "") == [kind, {**QUESTION, "input": "tonight"}, ANSWER]
    turns = [{"who": "user", "says": Q}, {"who": "assistant", "says": A}]
    columns = Columns(messages="chat", role="who", content="says")
    assert to_messages({"chat": turns}, columns, "") == [QUESTION, ANSWER]
    assert to_messages({"body": Q}, Columns(text="body"), "") == [{"role": "text", "content": Q}]


def test_a_name_that_is_given_has_to_be_there() -> None:
    """No other format is taken in its place, and nothing is read twice."""
    columns = Columns(instruction="input")
    assert to_messages({"input": Q, "output": A}, columns, "") == [QUESTION, ANSWER]
    for name in (dict(instruction="prompt"), dict(output="completion")):
        record = {"prompt": Q, "completion": A}
        assert to_messages(record, Columns(**name), "") == [QUESTION, ANSWER]
    record = {"instruction": SYSTEM["content"], "input": Q, "output": A}
    assert to_messages(record, Columns(system="instruction"), "") == TALK
    record = {"prompt": Q, "completion": "x", "response": A, "conversations": FROM}
    for name in ("output", "instruction"):
        columns = Columns(**{name: "response_"}, messages="none")
        with pytest.raises(UserError, match="no column"):
            to_messages(record, columns, "")
    with pytest.raises(UserError, match="no column"):
        to_messages({"conversations": FROM}, Columns(messages="mesages"), "")
    with pytest.raises(UserError, match="no column 'input', found: instruction, output"):
        to_messages({"instruction": Q, "output": A}, Columns(system="instruction"), "")


def test_used_columns_are_noted() -> None:
    used: set[str] = set()
    to_messages({"instruction": Q, "output": A, "history": [], "id": 3}, Columns(), "", used)
    assert used >= {"instruction", "input", "output", "system", "history"}
    assert "id" not in used


def test_an_error_names_record_field_content_and_what_was_expected() -> None:
    record = {"messages": [QUESTION, {"role": "assistant", "content": 42}]}
    with pytest.raises(UserError) as error:
        to_messages(record, Columns(), "a.json, record 7")
    assert str(error.value) == "a.json, record 7: messages[1].content is 42, expected text"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": TALK, "system": "Be loud."},
            r"system is .*, expected that of messages\[0\], or none",
        ),
        ({"a": Q, "messages_": [ANSWER]}, r"found: a, messages_. Name the columns with"),
        ({"prompt": '[{"role": "user"', "completion": A}, "prompt is .*, expected JSON"),
        (
            {"prompt": Q, "chosen": [ANSWER], "rejected": [ANSWER]},
            r"no column 'instruction', found: .* --columns.\*$",
        ),
        (
            {"instruction": Q, "output": A, "history": [[Q, None]]},
            r"history\[0\]\[1\] is null, expected text",
        ),
        (
            {"messages": [QUESTION, {**ANSWER, "reasoning_content": "\ud83d"}]},
            r"messages\[1\] is .*, expected valid Unicode",
        ),
    ],
)
def test_a_record_with_a_mistake(record: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_messages(record, Columns(), "here")


def test_a_date_that_python_does_not_know(tmp_path: Path) -> None:
    dates = pyarrow.array([2**62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"date": dates}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: malformed \("):
        list(read_records(tmp_path / "a.parquet"))


def test_a_damaged_file_of_gzip(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(LINES.encode()))
    messages = set()
    for place in range(10, len(content), 7):
        damaged = content.copy()
        damaged[place] ^= 16
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a.jsonl.gz") as error:
            list(read_records(tmp_path / "a.jsonl.gz"))
        messages.add(str(error.value).rpartition(". ")[2])
    assert "Download it again" in messages


RECORDS = [{"instruction": f"{Q} {n}\u2028", "output": f'"{A}"\n' * n} for n in range(1, 40)]
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)


def table(delimiter: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["instruction", "output"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return text.getvalue()


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), sink, row_group_size=7)
    return sink.getvalue().to_pybytes()


FILES = {
    "a.json": json.dumps(RECORDS).encode(),
    "indented.json": json.dumps(RECORDS, indent=2).encode(),
    "lines.json": LINES.encode(),
    "a.jsonl": f"{LINES}\n".encode(),
    "array.jsonl": json.dumps(RECORDS).encode(),
    "gaps.jsonl": LINES.replace("\n", "\r\n\r\n").encode(),
    "objects.jsonl": "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
    "bom.json": b"\xef\xbb\xbf" + LINES.encode(),
    "utf16.json": LINES.encode("utf-16"),
    "a.csv": table(",").encode(),
    "a.tsv": table("\t").encode(),
    "semicolons.csv": table(";").encode("utf-16"),
    "sep.csv": ("sep=;\r\n" + table(";")).encode(),
    "json.csv": LINES.encode(),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "misnamed.json": gzip.compress(json.dumps(RECORDS).encode()),
    "a.csv.bz2": bz2.compress(table(",").encode()),
    "a.json.zst": pyarrow.compress(LINES.encode(), "zstd", asbytes=True),
    "a.parquet": parquet(),
    "parquet.data": parquet(),
}


@pytest.mark.parametrize("chunk", [3, 100, 1 << 20])
@pytest.mark.parametrize(("name", "content"), FILES.items(), ids=FILES)
def test_files_of_all_kinds_hold_the_same_records(
    tmp_path: Path, monkeypatch, name: str, content: bytes, chunk: int
) -> None:
    monkeypatch.setattr(records, "CHUNK", chunk)
    (tmp_path / name).write_bytes(content)
    found = list(read_records(tmp_path / name))
    assert [record for _, record in found] == RECORDS
    assert found[6][0] == f"{tmp_path / name}, record 7"


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "part").mkdir()
    (tmp_path / ".hidden/a.json").write_text("no JSON")
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "b.jsonl").write_text(LINES)
    (tmp_path / "part/c.json.gz").write_bytes(gzip.compress(b'[{"text": "c"}]'))
    conversations = read_conversations(tmp_path, Columns())
    assert len(conversations) == 40
    assert conversations[f"{tmp_path}/part/c.json.gz, record 1"] == [
        {"role": "text", "content": "c"}
    ]


def test_nan_of_pandas_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"instruction": "a", "input": NaN, "output": "b"}]')
    ((_, record),) = read_records(tmp_path / "a.json")
    assert record["input"] is None


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"a": 1}\n{"a": 1}\n{"a" 1}\n' + b'{"a": 1}\n' * 9999, 3),
        (b'[{"a": 1},\n{"a": "b', 2),
        (b'{"a": 1}\n{"a": "two\nlines"}\n', 2),
        (b"<html>\n</html>", 1),
    ],
    ids=["mistake", "cut off", "line in a string", "HTML"],
)
def test_malformed_json_is_named_by_its_line(
    tmp_path: Path, monkeypatch, content: bytes, line: int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    for chunk in (3, 1 << 20):
        monkeypatch.setattr(records, "CHUNK", chunk)
        with pytest.raises(UserError, match=rf"a.jsonl, line {line}: malformed"):
            list(read_records(tmp_path / "a.jsonl"))
