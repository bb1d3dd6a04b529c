"""Mistakes in records, texts, metrics and folders: one line, a non-zero status, nothing touched."""
# ruff: noqa: F811, pytest finds the fixture `place` by its name

import json
import sys
from pathlib import Path

import pytest
from bad_input import (
    ALPACA,
    BASE,
    CHECKPOINT,
    JSON,
    PREPARE,
    Breaks,
    assert_refused,
    place,  # noqa: F401
    write,
)
from conftest import load_script

from lit_llama.runtime.cli import run

DOLLY, PLOT = "scripts/prepare_dolly.py", "scripts/plot_metrics.py"
PERPLEXITY, COMPARE = "evaluate/perplexity.py", "evaluate/compare.py"
UPLOAD = "scripts/upload.py"
CSV, JSONL = (PREPARE.replace("records.json", f"records.{kind}") for kind in ("csv", "jsonl"))
SIDES = "--models {}/checkpoint --models {}/lora --source {}/records.json --out_dir {}/new"
FILE = f"{CHECKPOINT} --prompt_file {{}}/a.txt"
DRAW = "--runs {} --out {}/new.png"
GOOD = {"instruction": "a", "output": "b"}
ROLES = ("user", "assistant", "user", "assistant")


def records(*values: object) -> Breaks:
    return write("records.json", json.dumps(values))


def talk(*turns: object) -> Breaks:
    """Three records; the second is a conversation of turns, (role, content) or other values."""
    keys = ("role", "content")
    messages = [dict(zip(keys, t, strict=True)) if isinstance(t, tuple) else t for t in turns]
    return records(GOOD, {"messages": messages}, GOOD)


# what is wrong: (what breaks it, script, flags, what the line says)
RECORDS = {
    "missing source": (None, ALPACA, PREPARE.replace("records", "none"), r"none.json: .*--source"),
    "empty file": (write("records.json", " \n"), JSON, PREPARE, r"records.json: holds no records"),
    "no records": (write("records.json", "[]"), JSON, PREPARE, r"records.json: holds no records"),
    "JSON cut off": (
        write("records.json", '[\n{"a": 1},\n{"a": "b'),
        JSON,
        PREPARE,
        r"json, line 3",
    ),
    "JSON with a mistake": (write("records.json", '[\n{"a" 1}]'), JSON, PREPARE, r"json, line 2: "),
    "JSONL with a mistake": (
        write("records.jsonl", f'{json.dumps(GOOD)}\n\n{{"a": }}\n'),
        *(JSON, JSONL, r"records.jsonl, line 3: "),
    ),
    "an object around the records": (
        write("records.json", '{"data": [{"instruction": "a", "output": "b"}]}'),
        *(
            JSON,
            f"{PREPARE.rpartition(' ')[0]} 0",
            r"record 1: .* or put the records of 'data' into",
        ),
    ),
    "another kind of file": (
        write("records.txt", "a"),
        *(
            JSON,
            PREPARE.replace(".json", ".txt"),
            r'records.txt, line 1: .*{"text": "..."}',
        ),
    ),
    "an Excel file": (
        write("records.xlsx", "PK\x03\x04"),
        *(
            JSON,
            PREPARE.replace(".json", ".xlsx"),
            r"records.xlsx: an Excel or ZIP file",
        ),
    ),
    "an Arrow file": (
        write("records.json", "ARROW1"),
        *(JSON, PREPARE, r"records.json: an Arrow file. Write it with to_parquet"),
    ),
    "a turn in the place of a record": (
        write("records.json", '[{"role": "user", "content": "a"}, {}]'),
        *(
            JSON,
            PREPARE.replace("val_size 2", "val_size 0"),
            r"record 1: .* Put the turns .* into a list",
        ),
    ),
    "a number of too many digits": (
        write("records.json", '[{"instruction": ' + "9" * 5000 + "}]"),
        *(JSON, PREPARE, r"records.json: malformed \(Exceeds the limit"),
    ),
    "nested too deeply": (
        write("records.json", "[" + '{"a":' * 100_000),
        *(JSON, PREPARE, r"records.json: malformed \(maximum recursion depth"),
    ),
    "a pointer of Git LFS": (
        write("records.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        *(JSON, PREPARE, r"records.json: a pointer of Git LFS.*git lfs pull"),
    ),
    "a folder without records": (
        None,
        *(JSON, PREPARE.replace("records.json", "checkpoint"), r"config.json, record 1: no column"),
    ),
    "Latin-1": (
        write("records.csv", "instruction,output\nä,b\n".encode("latin-1")),
        *(JSON, CSV, r"records.csv: not UTF-8"),
    ),
    "two columns of one name": (
        write("records.csv", "instruction,output,output\na,b,c\n"),
        *(JSON, CSV, r"records.csv, line 1: .*two columns are called 'output'"),
    ),
    "Parquet cut off": (
        write("records.parquet", b"PAR1 and then nothing"),
        *(JSON, PREPARE.replace("records.json", "records.parquet"), r"records.parquet: malformed"),
    ),
    "a comma too many": (
        write("records.csv", "instruction,output\na,b\nc,d, e\n"),
        *(JSON, CSV, r"records.csv, line 3: .*header"),
    ),
    "a field too few": (
        write("records.csv", "instruction,output\na\nc,d\n"),
        *(JSON, CSV, r"records.csv, line 2: .*header"),
    ),
    "a quote that does not end": (
        write("records.csv", 'instruction,output\na,"b\nc,d\n'),
        *(JSON, CSV, r"records.csv, line 2: malformed"),
    ),
    "a missing column": (
        records({"instruction": "a", "answer": "b"}, {}, {}),
        *(JSON, PREPARE, r"record 1: no column 'output', .*instruction, answer.*--columns"),
    ),
    "a column that does not exist": (
        None,
        *(JSON, f"{PREPARE} --columns.output answer", r"record 1: no column 'answer'.*output"),
    ),
    "Alpaca's records for Dolly's script": (
        None,
        DOLLY,
        PREPARE,
        r"record 1: no column 'response'",
    ),
    "Dolly's records for Alpaca's script": (
        records(*[{"instruction": "a", "context": "", "response": "b"}] * 3),
        *(ALPACA, PREPARE, r"record 1: no column 'output'"),
    ),
    "a number for an answer": (
        records(GOOD | {"output": 3}, GOOD, GOOD),
        JSON,
        PREPARE,
        r"record 1: ",
    ),
    "text for a record": (
        records(GOOD, "a", GOOD),
        JSON,
        PREPARE,
        r'2: is "a", expected an object',
    ),
    "messages in text": (
        records(GOOD, {"messages": "a"}, GOOD),
        *(JSON, PREPARE, r'record 2: messages is "a", expected a list'),
    ),
    "messages in an object": (
        records(GOOD, {"messages": {}}, GOOD),
        *(JSON, PREPARE, r"record 2: messages is {}, expected a list"),
    ),
    "a message in text": (
        talk("a"),
        *(JSON, PREPARE, r'2: messages\[0\] is "a", expected an object with role and content'),
    ),
    "a role that nobody has": (
        talk(("user", "a"), ("llama", "b")),
        *(JSON, PREPARE, r'messages\[1\].role is "llama", expected system, user'),
    ),
    "no role": (
        talk({"content": "a"}, ("assistant", "c")),
        *(JSON, PREPARE, r"2: messages\[0\] is .*--columns.role"),
    ),
    "no content": (
        talk({"role": "user"}, ("assistant", "a")),
        *(JSON, PREPARE, r"2: messages\[0\] is .*--columns.content"),
    ),
    "a picture in a message": (
        talk(("user", [{"type": "image_url", "image_url": "a"}]), ("assistant", "a")),
        *(JSON, PREPARE, r"messages\[0\].content is \[.*expected text"),
    ),
    "half a weight": (
        talk(("user", "a"), {"role": "assistant", "content": "b", "weight": 0.5}),
        *(JSON, PREPARE, r"messages\[1\].weight is 0.5, expected 0, 1, true or false"),
    ),
    "history of texts": (
        records(GOOD, GOOD | {"history": ["a", "b"]}, GOOD),
        *(JSON, PREPARE, r'history\[0\] is "a", expected a pair'),
    ),
    "conversations for Alpaca's template": (
        records(*[{"messages": [dict(role=role, content="a") for role in ROLES]}] * 3),
        *(JSON, f"{PREPARE} --template alpaca", r"no sample is left.*Use chatml or chat"),
    ),
    "no answers": (
        records(*[{"messages": [{"role": "user", "content": "a"}]}] * 3),
        *(JSON, PREPARE, r"no sample is left to train on: .*there is no answer to learn"),
    ),
    "half of an emoji": (
        records(GOOD, GOOD | {"output": "\ud83d"}, GOOD),
        JSON,
        PREPARE,
        r"record 2: ",
    ),
    "no room for a response": (
        None,
        JSON,
        f"{PREPARE} --max_seq_length 5",
        r"no sample.*_length 5",
    ),
    "val_size too large": (None, JSON, f"{PREPARE}0000", r"--val_size 20000: .*60", 2),
    "a folder of something else": (
        None,
        *(JSON, PREPARE.replace("/new", "/checkpoint"), r"checkpoint: exists already"),
    ),
    "a dataset in a file": (
        None,
        JSON,
        PREPARE.replace("/new", "/records.json/a"),
        r"records.json",
    ),
    "no right to write": (None, JSON, PREPARE.replace("{}/new", "/proc/new"), r"/proc"),
}
OTHERS = {
    "records to score": (
        write("records.json", "[{}"),
        *(PERPLEXITY, f"{CHECKPOINT} --source {{}}/records.json", r"record 1: no column"),
    ),
    "records to compare": (write("records.json", "[{"), COMPARE, SIDES, r"records.json, line 1: "),
    "UTF-16 to score": (
        write("book.txt", "a book".encode("utf-16")),
        *(PERPLEXITY, f"{CHECKPOINT} --source {{}}/book.txt", r"book.txt: not UTF-8"),
    ),
    "nothing to score": (
        write("a.txt", ""),
        *(PERPLEXITY, f"{CHECKPOINT} --source {{}}/a.txt", r"a.txt: nothing"),
    ),
    "UTF-16 prompts": (write("a.txt", "Hi".encode("utf-16")), BASE, FILE, r"a.txt: not UTF-8"),
    "no prompt": (write("a.txt", "\n \n"), BASE, FILE, r"a.txt: holds no prompt"),
    "no file of prompts": (None, BASE, FILE, r"a.txt: .*No such file.*--prompt_file"),
    "metrics of another program": (
        write("metrics.csv", "a,b\n1,2\n"),
        PLOT,
        DRAW,
        r"metrics.csv: ",
    ),
    "empty metrics": (write("metrics.csv", ""), PLOT, DRAW, r"metrics.csv: "),
    "no run to plot": (None, PLOT, DRAW, r"metrics.csv: "),
    "results that exist": (
        None,
        COMPARE,
        SIDES.replace("/new", "/records.json"),
        r"records.json",
        2,
    ),
    "no folder to upload": (None, UPLOAD, "--path {}/none --repo_id me/x", r"none: "),
    "a dataset to upload": (None, UPLOAD, "--path {}/data --repo_id me/x", r"data: holds no LoRA"),
}
CASES = RECORDS | OTHERS


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_line_and_nothing_touched(place: Path, monkeypatch, capsys, case: tuple) -> None:
    assert_refused(place, case, monkeypatch, capsys)


ROWS = [{"instruction": f"a {n}", "input": "ä" * (n % 2), "output": "b" * n} for n in range(5)]
LINES = ["instruction,input,output", *(",".join(row.values()) for row in ROWS)]
ODD = {
    "JSON with a BOM": ("a.json", "\ufeff" + json.dumps(ROWS)),
    "JSON in CRLF": ("a.json", json.dumps(ROWS, indent=1).replace("\n", "\r\n")),
    "JSONL in CRLF": ("a.jsonl", "\r\n".join(map(json.dumps, ROWS))),
    "CSV of Windows": ("a.csv", "\ufeff" + "\r\n".join(LINES)),
    "CSV of a German Excel": ("a.csv", "\r\n".join(LINES).replace(",", ";")),
    "CSV with a space in the header": ("a.csv", "\n".join(LINES).replace("n,i", "n , i")),
    "TSV": ("a.tsv", "\n".join(LINES).replace(",", "\t")),
    "JSON in lines": ("a.json", "\n".join(map(json.dumps, ROWS))),
    "JSON in indented objects": ("a.jsonl", "\n".join(json.dumps(r, indent=1) for r in ROWS)),
    "an array in a JSONL": ("a.jsonl", json.dumps(ROWS)),
    "capitals": ("a.JSONL", json.dumps(ROWS)),
    "NaN of pandas": ("a.json", json.dumps(ROWS).replace('"input": ""', '"input": NaN')),
    "CSV of pandas": ("a.csv", "\n".join(f"{n or ''},{row}" for n, row in enumerate(LINES))),
    "CSV of a spreadsheet": ("a.csv", "\n".join(f"{row},," for row in LINES)),
    "a long field": (
        "a.csv",
        "\n".join(f"{row},{'x' * 200_000 * n}" for n, row in enumerate(LINES)),
    ),
}


@pytest.mark.parametrize(("name", "text"), ODD.values(), ids=ODD)
def test_odd_but_good_files_give_the_same_samples(
    place: Path, monkeypatch, name: str, text: str
) -> None:
    (place / "plain.json").write_text(json.dumps(ROWS))
    (place / name).write_text(text, "utf-8", newline="")
    for source, data_dir in (("plain.json", "plain"), (name, "odd")):
        flags = [f"--source={place / source}", f"--data_dir={place / data_dir}", "--val_size=1"]
        flags += [f"--checkpoint_dir={place / 'checkpoint'}", "--template=alpaca"]
        monkeypatch.setattr(sys, "argv", [JSON, *flags])
        run(load_script(JSON).main)
    for file in ("train.safetensors", "val.safetensors"):
        assert (place / "plain" / file).read_bytes() == (place / "odd" / file).read_bytes()
