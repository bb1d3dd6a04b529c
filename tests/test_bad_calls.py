"""What is wrong with records, flags and folders: the second table of bad input (bad_input.py says what must hold)."""

# ruff: noqa: F811, pytest finds the fixture `place` by its name

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input import (
    ALPACA,
    ASK,
    ASK_ADAPTER,
    ASK_LORA,
    BASE,
    CHECKPOINT,
    FINETUNE,
    GGUF,
    JSON,
    LIT,
    LORA,
    MERGE,
    META,
    PREPARE,
    TRAIN,
    TRAIN_ADAPTER,
    assert_refused,
    place,  # noqa: F401
    write,
)
from conftest import load_script

from lit_llama import cli
from lit_llama.files import replacing
from lit_llama.flags import read
from lit_llama.plots import PANELS

DOLLY, FULL, CHAT = "scripts/prepare_dolly.py", "finetune/full.py", "generate/chat.py"
COMBINE, MEMORY, UPLOAD = "scripts/combine_loras.py", "scripts/estimate_memory.py", "scripts/upload.py"
PLOT, PERPLEXITY = "scripts/plot_metrics.py", "evaluate/perplexity.py"
COMPARE, HARNESS = "evaluate/compare.py", "evaluate/harness.py"
ADAPTER_V2 = "generate/adapter_v2.py"

GOOD = {"instruction": "a", "output": "b"}
PREPARE_CSV, PREPARE_JSONL = (PREPARE.replace("records.json", f"records.{kind}") for kind in ("csv", "jsonl"))
SCORE = f"{CHECKPOINT} --source {{}}/records.json"
SIDES = "--models {}/checkpoint --models {}/lora --source {}/records.json --out_dir {}/new"
TASKS = f"{CHECKPOINT} --tasks a --include_path {{}}/tasks"
HEADER = ",".join(("step", "val_loss", *PANELS))
DRAW = "--runs {} --out {}/new.png"
LONG = "x" * 5000


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda place: (place / name).write_bytes(content)


def records(*values: object) -> Callable[[Path], object]:
    return write("records.json", json.dumps(values))


def talk(*turns: object) -> Callable[[Path], object]:
    """Records of which the second is this conversation, of (role, content) or of whatever else."""
    messages = [
        dict(zip(("role", "content"), turn, strict=True)) if isinstance(turn, tuple) else turn for turn in turns
    ]
    return records(GOOD, {"messages": messages}, GOOD)


def link(name: str, target: str) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(target.replace("{}", str(place)))

    return make


def pipe(name: str) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        os.mkfifo(place / name)

    return make


def folder(name: str) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        (place / name).mkdir()

    return make


def config(text: str) -> tuple:
    """What breaks it, script and flags of a finetuning run with such a --config."""
    return write("a.yaml", text), FINETUNE, f"{TRAIN} --config {{}}/a.yaml"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
TOUCH = "!!python/object/apply:os.mkdir ['{}/ran']"

# what is wrong: (what breaks it, the script, its flags, what the line says, the exit status)
RECORDS = {
    "UTF-16, little end first": (put("records.json", "[]".encode("utf-16-le")), JSON, PREPARE, r"line 1: holds a NUL"),
    "UTF-16, big end first": (put("records.json", "[]".encode("utf-16-be")), JSON, PREPARE, r"line 1: holds a NUL"),
    "UTF-16 with its BOM": (put("records.json", "[]".encode("utf-16")), JSON, PREPARE, r"records.json: not UTF-8"),
    "UTF-32": (put("records.json", "[]".encode("utf-32")), JSON, PREPARE, r"records.json: not UTF-8"),
    "UTF-16 CSV of a spreadsheet": (
        put("records.csv", "instruction,output\r\na,b\r\n".encode("utf-16")),
        *(JSON, PREPARE_CSV, r"records.csv: not UTF-8"),
    ),
    "Latin-1 CSV": (
        put("records.csv", "instruction,output\nä,b\n".encode("latin-1")),
        *(JSON, PREPARE_CSV, r"records.csv: not UTF-8 \(byte 19\)"),
    ),
    "NUL in JSONL": (
        put("records.jsonl", json.dumps(GOOD).encode() + b'\n{"instruction": "\0"}\n'),
        *(JSON, PREPARE_JSONL, r"records.jsonl, line 2: holds a NUL"),
    ),
    "NUL in CSV": (
        put("records.csv", b"instruction,output\na,b\n\0,c\n"),
        *(JSON, PREPARE_CSV, r"records.csv, line 3: holds a NUL"),
    ),
    "a file of zeros": (put("records.json", bytes(10_000)), JSON, PREPARE, r"records.json, line 1: holds a NUL"),
    "lone surrogate in an answer": (
        records(GOOD, GOOD | {"output": "\ud800"}, GOOD),
        *(JSON, PREPARE, r"record 2: the text holds a lone surrogate at character 0"),
    ),
    "lone surrogate in a conversation": (
        talk(("user", "a"), ("assistant", "b\udfff")),
        *(JSON, f"{PREPARE} --template chatml", r"record 2: the text holds a lone surrogate at character 1"),
    ),
    "lone surrogate in a CSV": (
        put("records.csv", b"instruction,output\n\xed\xa0\x80,b\n"),
        *(JSON, PREPARE_CSV, r"records.csv: not UTF-8"),
    ),
    "nested to 100,000 levels": (write("records.json", "[" * 10**5), JSON, PREPARE, r"records.json, line 1: JSON that"),
    "nested to 10,000 levels, whole": (
        write("records.json", f'[{{"instruction": {"[" * 10**4}{"]" * 10**4}, "output": "b"}}]'),
        *(JSON, PREPARE, r"records.json, line 1: JSON that cannot be read"),
    ),
    "objects nested to 10,000 levels in JSONL": (
        write("records.jsonl", json.dumps(GOOD) + "\n" + '{"a":' * 10**4 + "1" + "}" * 10**4),
        *(JSON, PREPARE_JSONL, r"records.jsonl, line 2: JSON that cannot be read"),
    ),
    "one line of 50 MB": (
        lambda p: (p / "records.jsonl").write_text(json.dumps(GOOD | {"output": "a b " * 12_500_000})),
        *(JSON, f"{PREPARE_JSONL} --val_size 0", r"record 1: a text of 50,000,000 characters.*Cut it"),
    ),
    "one CSV field of 50 MB": (
        lambda p: (p / "records.csv").write_text(f"instruction,output\na,{'b' * 50_000_000}\n"),
        *(JSON, f"{PREPARE_CSV} --val_size 0", r"record 1: a text of 50,000,000 characters"),
    ),
    "a conversation of 50 MB": (
        talk(("user", "a"), ("assistant", "b " * 25_000_000)),
        *(JSON, PREPARE, r"record 2: a text of 50,000,000 characters"),
    ),
    "a key twice": (
        write("records.json", f'[{json.dumps(GOOD)}, {{"instruction": "a", "output": "b", "output": "c"}}, {{}}]'),
        *(JSON, PREPARE, r"record 2: a key is there twice in it, one of instruction, output"),
    ),
    "a key twice in JSONL": (
        write("records.jsonl", '{"instruction": "a", "instruction": "b", "output": "c"}\n'),
        *(JSON, f"{PREPARE_JSONL} --val_size 0", r"record 1: a key is there twice"),
    ),
    "a role twice": (
        write("records.json", '[{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}]'),
        *(JSON, f"{PREPARE} --val_size 0", r"record 1: a key is there twice in it, one of role, content"),
    ),
    "null for an answer": (records(GOOD, GOOD | {"output": None}, {}), JSON, PREPARE, r"record 2: .*should be text"),
    "NaN for an input": (
        records(GOOD, GOOD | {"input": float("nan")}, {}),
        *(JSON, PREPARE, r"record 2: .*should be text"),
    ),
    "Infinity for an instruction": (
        records(GOOD, GOOD | {"instruction": float("inf")}, {}),
        *(JSON, PREPARE, r"record 2: .*should be text"),
    ),
    "a list for an answer": (records(GOOD, GOOD | {"output": ["b"]}, {}), JSON, PREPARE, r"record 2: .*should be text"),
    "true for an input": (records(GOOD, GOOD | {"input": True}, {}), JSON, PREPARE, r"record 2: .*should be text"),
    "null for a record": (records(GOOD, None, GOOD), JSON, PREPARE, r"record 2: should be an object, is NoneType"),
    "a list for a record": (records(GOOD, [GOOD], GOOD), JSON, PREPARE, r"record 2: should be an object, is list"),
    "an object for all": (write("records.json", '{"data": []}'), JSON, PREPARE, r"should hold an array of records"),
    "a number for all": (write("records.json", "7"), JSON, PREPARE, r"should hold an array of records"),
    "two JSON values": (write("records.json", "[{}]\n[{}]"), JSON, PREPARE, r"records.json, line 2, column 1: .*Extra"),
    "JSONL called JSON": (write("records.json", "{}\n{}\n"), JSON, PREPARE, r"records.json, line 2, column 1"),
    "JSON called JSONL": (write("records.jsonl", "[{},\n{}]"), JSON, PREPARE_JSONL, r"records.jsonl, line 1, column 5"),
    "a comma behind the last": (write("records.json", '[{"a": "b"},]'), JSON, PREPARE, r"line 1, column 1[23]"),
    "Python's quotes": (write("records.json", "[{'a': 'b'}]"), JSON, PREPARE, r"records.json, line 1, column 3"),
    "only a BOM": (put("records.json", b"\xef\xbb\xbf"), JSON, PREPARE, r"records.json: the file is empty"),
    "a CSV column twice": (
        write("records.csv", "instruction,output,output\na,b,c\n"),
        *(JSON, PREPARE_CSV, r"records.csv, line 1: should name the columns, and none twice: instruction, output, out"),
    ),
    "a CSV header of nothing": (
        write("records.csv", ",\na,b\n"),
        JSON,
        PREPARE_CSV,
        r"line 1: should name the columns",
    ),
    "a CSV that begins with an empty line": (
        write("records.csv", "\ninstruction,output\na,b\n"),
        *(JSON, PREPARE_CSV, r"records.csv, line 1: should name the columns"),
    ),
    "a CSV of a header": (write("records.csv", "instruction,output\n"), JSON, PREPARE_CSV, r"with at least one in it"),
    "a CSV with semicolons": (
        write("records.csv", "instruction;output\na;b\n"),
        *(JSON, f"{PREPARE_CSV} --val_size 0", r"record 1: no column 'instruction', found: instruction;output"),
    ),
    "a CSV quote without an end": (
        write("records.csv", 'instruction,output\n"a,b\nc,d\n'),
        *(JSON, PREPARE_CSV, r"records.csv, line 2: malformed CSV \(unexpected end of data\)"),
    ),
    "a hundred thousand columns": (
        write("records.json", json.dumps([{f"column {n}": "" for n in range(10**5)}] * 3)),
        *(JSON, PREPARE, r"record 1: no column 'instruction', found: column 0.*--columns"),
    ),
    "messages that are empty": (talk(), JSON, PREPARE, r"record 2: `messages` should be a list"),
    "messages that are null": (records(GOOD, {"messages": None}, GOOD), JSON, PREPARE, r"record 2: `messages` should"),
    "messages that are an object": (records(GOOD, {"messages": {}}, GOOD), JSON, PREPARE, r"record 2: `messages`"),
    "messages that are text": (records(GOOD, {"messages": "a"}, GOOD), JSON, PREPARE, r"record 2: `messages`"),
    "a message that is text": (talk("a"), JSON, PREPARE, r"record 2: `messages` should"),
    "the assistant first": (talk(("assistant", "a"), ("user", "b")), JSON, PREPARE, r"record 2: `messages` .*before"),
    "no assistant": (talk(("user", "a"), ("user", "b")), JSON, PREPARE, r"record 2: .*with an assistant's answer"),
    "an unknown role": (talk(("user", "a"), ("tool", "b"), ("assistant", "c")), JSON, PREPARE, r"record 2: `messages`"),
    "a role that is a list": (talk((["user"], "a"), ("assistant", "c")), JSON, PREPARE, r"record 2: `messages`"),
    "no role": (talk({"content": "a"}, ("assistant", "c")), JSON, PREPARE, r"record 2: `messages` should"),
    "content of null": (talk(("user", None), ("assistant", "a")), JSON, PREPARE, r"record 2: `messages` should"),
    "content of parts": (talk(("user", [{"text": "a"}]), ("assistant", "a")), JSON, PREPARE, r"record 2: `messages`"),
    "no content": (talk({"role": "user"}, ("assistant", "a")), JSON, PREPARE, r"record 2: `messages` should"),
    "a conversation for Alpaca's template": (
        talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        *(JSON, PREPARE, r"record 2: template 'alpaca' holds a single instruction.*--template chatml"),
    ),
    "two users in a row, for a template that has none": (
        lambda p: (
            talk(("user", "a"), ("user", "b"), ("assistant", "c"))(p),
            write(
                "checkpoint/chat_template.jinja",
                "{% if messages | length > 1 and messages[1].role == 'user' %}{{ raise_exception('no') }}{% endif %}",
            )(p),
        ),
        *(JSON, f"{PREPARE} --template chat", r"record 2: .*checkpoint.*: its chat template failed \(.*no\)"),
    ),
    "Alpaca's records for Dolly's script": (
        None,
        DOLLY,
        PREPARE,
        r"record 1: no column 'response', found: instruction",
    ),
    "Dolly's records for Alpaca's script": (
        records(*[{"instruction": "a", "context": "", "response": "b"}] * 3),
        *(ALPACA, PREPARE, r"record 1: no column 'output', found: instruction, context, response"),
    ),
    "a column that is not there": (
        None,
        *(
            JSON,
            f"{PREPARE} --columns.output answer",
            r"record 1: no column 'answer', found: instruction, input, output",
        ),
    ),
    "a column for two": (
        None,
        JSON,
        f"{PREPARE} --columns.output instruction",
        r"--columns.*should be three columns",
        2,
    ),
    "a column for two in perplexity": (None, PERPLEXITY, f"{SCORE} --columns.input output", r"--columns.*three", 2),
    "malformed records to score": (write("records.json", "[{}"), PERPLEXITY, SCORE, r"records.json, line 1, column 4"),
    "malformed records to compare": (write("records.json", "[{}"), COMPARE, SIDES, r"records.json, line 1, column 4"),
    "a UTF-16 text to score": (
        put("book.txt", "a book".encode("utf-16")),
        *(PERPLEXITY, f"{CHECKPOINT} --source {{}}/book.txt", r"book.txt: not UTF-8 \(byte 0\)"),
    ),
    "no text to score": (
        write("a.txt", ""),
        PERPLEXITY,
        f"{CHECKPOINT} --source {{}}/a.txt",
        r"a.txt: nothing to predict",
    ),
    "an endless prompt": (
        put("prompts.txt", b"a " * 25_000_000),
        *(BASE, f"{CHECKPOINT} --prompt_file {{}}/prompts.txt", r"prompts.txt, prompt 1: .*50,000,000 characters"),
    ),
    "UTF-16 prompts": (
        put("prompts.txt", "Hi".encode("utf-16")),
        *(BASE, f"{CHECKPOINT} --prompt_file {{}}/prompts.txt", r"prompts.txt: not UTF-8"),
    ),
    "prompts with NUL": (
        put("prompts.txt", b"a\n\0\n"),
        *(BASE, f"{CHECKPOINT} --prompt_file {{}}/prompts.txt", r"prompts.txt, line 2: holds a NUL"),
    ),
    "no prompt": (write("a.txt", "\n \n"), BASE, f"{CHECKPOINT} --prompt_file {{}}/a.txt", r"a.txt: holds no prompt"),
    "metrics of nothing": (write("metrics.csv", ""), PLOT, DRAW, r"metrics.csv: no metrics of a run"),
    "metrics with another header": (write("metrics.csv", "a,b\n1,2\n"), PLOT, DRAW, r"there is no column grad_norm"),
    "metrics with a column twice": (
        write("metrics.csv", f"{HEADER},step\n1,,1,1,1,1,1\n"),
        *(PLOT, DRAW, r"metrics.csv: no metrics of a run, a column is there twice"),
    ),
    "text for a metric": (
        write("metrics.csv", f"{HEADER}\n1,,1,1,1,1\n2,,much,1,1,1\n"),
        *(PLOT, DRAW, r"metrics.csv, line 3: damaged"),
    ),
    "NaN for a metric": (
        write("metrics.csv", f"{HEADER}\n1,,nan,1,1,1\n"),
        PLOT,
        DRAW,
        r"metrics.csv, line 2: damaged",
    ),
    "a metric beyond all": (write("metrics.csv", f"{HEADER}\n1,,1e308,1,1,1\n"), PLOT, DRAW, r"line 2: damaged"),
    "binary metrics": (put("metrics.csv", bytes(range(256))), PLOT, DRAW, r"metrics.csv: not UTF-8"),
    "metrics of a header": (write("metrics.csv", f"{HEADER}\n"), PLOT, DRAW, r"metrics.csv: no step in it yet"),
    "a metrics file cut off in its first row": (
        write("metrics.csv", f"{HEADER}\n1,,1"),
        PLOT,
        DRAW,
        r"no step in it yet",
    ),
}

FLAGS = {
    "max_new_tokens of -1": (None, BASE, f"{ASK} --max_new_tokens -1", r"--max_new_tokens from 0 on", 2),
    "max_new_tokens of a billion": (
        None,
        BASE,
        f"{ASK} --max_new_tokens {10**12}",
        r"--max_new_tokens asks for 10{12}",
    ),
    "max_new_tokens of 40 digits": (
        None,
        BASE,
        f"{ASK} --max_new_tokens {10**39}",
        r"--max_new_tokens 10+: .*18 digits",
        2,
    ),
    "max_new_tokens of 5,000 digits": (
        None,
        BASE,
        f"{ASK} --max_new_tokens {'1' * 5000}",
        r"--max_new_tokens 1+ ... 1",
        2,
    ),
    "half a token": (None, BASE, f"{ASK} --max_new_tokens 1.5", r"--max_new_tokens 1.5: should be a whole number", 2),
    "temperature of -1": (None, BASE, f"{ASK} --temperature -1", r"--temperature should be 0 or from 1e-6 on", 2),
    "temperature of NaN": (None, BASE, f"{ASK} --temperature .nan", r"--temperature", 2),
    "temperature of infinity": (None, BASE, f"{ASK} --temperature .inf", r"--temperature", 2),
    "temperature next to 0": (None, BASE, f"{ASK} --temperature 1e-300", r"--temperature", 2),
    "top_k of -1": (None, BASE, f"{ASK} --top_k -1", r"--top_k from 1 on", 2),
    "top_p of 2": (None, BASE, f"{ASK} --top_p 2", r"--top_p in \(0, 1\]", 2),
    "top_p of NaN": (None, BASE, f"{ASK} --top_p .nan", r"--top_p", 2),
    "batch_size of 0": (None, BASE, f"{ASK} --batch_size 0", r"--batch_size, --num_samples: should be at least 1", 2),
    "num_samples of 0": (None, BASE, f"{ASK} --num_samples 0", r"--batch_size, --num_samples: should be at least 1", 2),
    "a seed beyond 64 bits": (None, BASE, f"{ASK} --seed {2**70}", rf"--seed {2**70}: .*18 digits", 2),
    "a seed of NaN": (None, FINETUNE, f"{TRAIN} --seed .nan", r"--seed .nan: should be a whole number", 2),
    "a seed of training beyond 64 bits": (None, FINETUNE, f"{TRAIN} --seed -{2**70}", r"--seed -\d+: .*18 digits", 2),
    "a seed of a split beyond 64 bits": (None, JSON, f"{PREPARE} --seed {2**64}", r"--seed \d+: .*18 digits", 2),
    "no prompt at all": (None, BASE, CHECKPOINT, r"--prompt, --prompt_file: give one of them", 2),
    "two kinds of prompt": (None, BASE, f"{ASK} --prompt_file {{}}/a.txt", r"--prompt, --prompt_file: give one", 2),
    "a prompt that is no UTF-8": (
        None,
        *(BASE, [*CHECKPOINT.split(), "--prompt", "a\udcff"], r"--prompt a\?: should be UTF-8", 2),
    ),
    "an input that is no UTF-8": (None, BASE, [*ASK.split(), "--input", "\udc80"], r"--input \?: should be UTF-8", 2),
    "an unknown quantization": (None, BASE, f"{ASK} --quantize nf4", r"--quantize nf4: ", 2),
    "a quantization for decoding in training": (None, FINETUNE, f"{TRAIN} --quantize int8", r"--quantize int8: ", 2),
    "quantize in full finetuning": (
        None,
        FULL,
        f"{TRAIN} --quantize nf4",
        r"--quantize nf4: all linear layers train",
        2,
    ),
    "quantize on two devices": (
        None,
        FINETUNE,
        f"{TRAIN} --quantize nf4 --devices 2",
        r"--quantize nf4: works on one",
        2,
    ),
    "an unknown precision": (None, BASE, f"{ASK} --precision fp16", r"--precision fp16: unknown. Known: bf16-true", 2),
    "mixed precision in decoding": (None, BASE, f"{ASK} --precision bf16-mixed", r"--precision bf16-mixed: unknown", 2),
    "an unknown template": (None, BASE, f"{ASK} --template vicuna", r"unknown template 'vicuna'. Known: alpaca"),
    "a draft for many prompts": (
        write("prompts.txt", "a\nb\n"),
        BASE,
        f"{CHECKPOINT} --prompt_file {{}}/prompts.txt --draft_checkpoint_dir {{}}/checkpoint --max_new_tokens 2",
        *(r"--draft_checkpoint_dir: for one prompt", 2),
    ),
    "a draft that is no folder": (None, BASE, f"{ASK} --draft_checkpoint_dir {{}}/none", r"none: no config.json there"),
    "the same LoRA twice": (
        None,
        LORA,
        f"{ASK_LORA} --lora_path {{}}/lora",
        r"--lora_path: .*several different ones",
        2,
    ),
    "no LoRA in the list": (
        None,
        LORA,
        "--lora_path [] --prompt Hi",
        r"--lora_path: should be one folder or several",
        2,
    ),
    "a LoRA and an adapter to chat with": (
        None,
        *(
            CHAT,
            "--lora_path {}/lora --adapter_path {}/lora",
            r"--checkpoint_dir, --lora_path, --adapter_path: give",
            2,
        ),
    ),
    "nothing to chat with": (None, CHAT, "", r"--checkpoint_dir, --lora_path, --adapter_path: give a model", 2),
    "a chat without room": (
        None,
        CHAT,
        f"{CHECKPOINT} --context 8 --max_new_tokens 8",
        r"--max_new_tokens 8: .*below",
        2,
    ),
    "a context of -1": (None, CHAT, f"{CHECKPOINT} --context -1", r"--max_new_tokens 512: should be .*--context -1", 2),
    "a system message for Alpaca's template": (
        None,
        *(
            CHAT,
            f"{CHECKPOINT} --template alpaca --system a --max_new_tokens 8",
            r"--system: template 'alpaca' has no",
            2,
        ),
    ),
    "a LoRA's folder for an adapter's": (None, ADAPTER_V2, ASK_ADAPTER, r"lora.*: method is None, not llama_adapter"),
    "learning rate of NaN": (None, FINETUNE, f"{TRAIN} --train.learning_rate .nan", r"--train.learning_rate nan: ", 2),
    "learning rate of -1": (
        None,
        FINETUNE,
        f"{TRAIN} --train.learning_rate -1",
        r"--train.learning_rate -1.0: .*from 0",
        2,
    ),
    "learning rate of infinity": (None, FULL, f"{TRAIN} --train.learning_rate .inf", r"--train.learning_rate inf", 2),
    "beta1 of 1": (None, FINETUNE, f"{TRAIN} --train.beta1 1", r"--train.beta1 1.0: .*below 1.0", 2),
    "beta2 of 1.5": (None, FINETUNE, f"{TRAIN} --train.beta2 1.5", r"--train.beta2 1.5: .*below 1.0", 2),
    "weight decay of -1": (None, FINETUNE, f"{TRAIN} --train.weight_decay -1", r"--train.weight_decay -1", 2),
    "max_steps of 0": (None, FINETUNE, f"{TRAIN} --train.max_steps 0", r"--train.max_steps 0: should be from 1 on", 2),
    "an empty micro-batch": (
        None,
        FINETUNE,
        f"{TRAIN} --train.micro_batch_tokens 0",
        r"--train.micro_batch_tokens 0",
        2,
    ),
    "a warm-up of -1 steps": (
        None,
        FINETUNE,
        f"{TRAIN} --train.warmup_steps -1",
        r"--train.warmup_steps -1: .*from 0",
        2,
    ),
    "a warm-up of NaN epochs": (
        None,
        FINETUNE,
        f"{TRAIN} --train.warmup_epochs .nan",
        r"--train.warmup_epochs nan",
        2,
    ),
    "an unknown schedule": (None, FINETUNE, f"{TRAIN} --train.schedule linear", r"--train.schedule linear: unknown", 2),
    "eval_interval of 0": (None, FINETUNE, f"{TRAIN} --train.eval_interval 0", r"--train.eval_interval 0", 2),
    "save_interval of 0": (None, FINETUNE, f"{TRAIN} --train.save_interval 0", r"--train.save_interval 0", 2),
    "log_interval of 0": (None, FINETUNE, f"{TRAIN} --train.log_interval 0", r"--train.log_interval 0", 2),
    "max_grad_norm of NaN": (None, FINETUNE, f"{TRAIN} --train.max_grad_norm .nan", r"--train.max_grad_norm nan", 2),
    "a million devices": (
        None,
        FINETUNE,
        f"{TRAIN} --devices {10**6}",
        r"--devices 1000000: should be at most \d+ ",
        2,
    ),
    "no node": (None, FINETUNE, f"{TRAIN} --num_nodes 0", r"--num_nodes 0: should be at least 1", 2),
    "a rank of a billion": (None, FINETUNE, f"{TRAIN} --lora.r {10**9}", r"--lora.r 1000000000: .*at most 16384", 2),
    "alpha of NaN": (None, FINETUNE, f"{TRAIN} --lora.alpha .nan", r"--lora.alpha nan: should be more than 0", 2),
    "a prompt of a billion": (
        None,
        *(TRAIN_ADAPTER, f"{TRAIN} --adapter.prompt_length {10**9}", r"--adapter.prompt_length .*at most 16384", 2),
    ),
    "an unknown logger": (None, FINETUNE, f"{TRAIN} --logger excel", r"--logger excel: unknown. Known: tensorboard", 2),
    "val_size of -1": (None, JSON, f"{PREPARE} --val_size -1", r"--val_size -1: should be from 0 to 59", 2),
    "all records for validation": (None, JSON, f"{PREPARE} --val_size 60", r"--val_size 60: should be from 0 to 59", 2),
    "samples of a token": (None, JSON, f"{PREPARE} --max_seq_length 1", r"--max_seq_length 1: should be at least 2", 2),
    "weights for two of one LoRA": (
        None,
        *(COMBINE, "--lora_path {}/lora --weights [1,2] --out_dir {}/new", r"--weights: 2 for 1 of --lora_path", 2),
    ),
    "a weight of NaN": (
        None,
        COMBINE,
        "--lora_path {}/lora --weights [.nan] --out_dir {}/new",
        r"--weights \[nan\]",
        2,
    ),
    "no LoRA to combine": (None, COMBINE, "--lora_path [] --out_dir {}/new", r"--weights: 0 for 0", 2),
    "no model of that name": (None, MEMORY, "--model 8B", r"unknown model name '8B'. Known: 7B"),
    "no method of that name": (None, MEMORY, "--method ia3", r"--method ia3: unknown. Known: lora", 2),
    "a device that there is not": (None, MEMORY, "--device tpu", r"--device tpu: unknown. Known: cuda, cpu", 2),
    "a trillion tokens to estimate": (
        None,
        MEMORY,
        f"--micro_batch_tokens {10**12}",
        r"--micro_batch_tokens.*a million",
        2,
    ),
    "a window beyond the context": (
        None,
        PERPLEXITY,
        f"{SCORE} --window 10000",
        r"--window 10000.*the context of 512",
        2,
    ),
    "a stride as wide as the window": (
        None,
        PERPLEXITY,
        f"{SCORE} --window 8 --stride 8",
        r"--stride below --window",
        2,
    ),
    "a stride of 0": (None, PERPLEXITY, f"{SCORE} --stride 0", r"--window 512, --stride 0", 2),
    "nothing to score": (None, PERPLEXITY, CHECKPOINT, r"--source, --data_dir: give one of them", 2),
    "no model to score": (None, PERPLEXITY, "--source {}/records.json", r"--checkpoint_dir, --lora_path, --adapter", 2),
    "nothing to compare": (None, COMPARE, "--source {}/records.json --models []", r"--models \[\]: should name", 2),
    "no model named": (None, COMPARE, "--source {}/records.json", r"--models: needed", 2),
    "a model twice": (
        None,
        COMPARE,
        "--models {}/lora --models {}/lora --source {}/records.json",
        r"--models .*none twice",
        2,
    ),
    "nothing to compare them on": (
        None,
        COMPARE,
        "--models {}/checkpoint",
        r"--source, --data_dir, --prompt_file: give one",
        2,
    ),
    "a model that is none": (
        None,
        COMPARE,
        f"{SIDES} --models {{}}/data",
        r"data: no adapter_config.json and no config",
    ),
    "max_samples of 0": (None, COMPARE, f"{SIDES} --max_samples 0", r"--max_samples, --max_new_tokens", 2),
    "a limit of NaN": (None, HARNESS, f"{TASKS} --limit .nan", r"--limit: more than 0", 2),
    "no tasks": (None, HARNESS, f"{CHECKPOINT} --tasks []", r"--tasks: name at least one", 2),
    "no folder of tasks": (None, HARNESS, TASKS, r"--include_path .*tasks: is no folder", 2),
    "a template without a place": (
        None,
        HARNESS,
        f"{TASKS} --template chatml",
        r"--template chatml: .*--apply_chat",
        2,
    ),
    "no owner in a name on the hub": (
        None,
        UPLOAD,
        "--path {}/lora --repo_id mine",
        r"--repo_id mine: .*owner/name",
        2,
    ),
    "a path for a name on the hub": (None, UPLOAD, "--path {}/lora --repo_id ../../x", r"--repo_id ../../x: ", 2),
    "a long name on the hub": (None, UPLOAD, f"--path {{}}/lora --repo_id me/{LONG}", r"--repo_id me/x+", 2),
    "no --config": (None, FINETUNE, f"{TRAIN} --config {{}}/a.yaml", r"--config .*a.yaml: cannot be read \(No such", 2),
    "a folder for --config": (None, FINETUNE, f"{TRAIN} --config {{}}/data", r"--config .*data: .*\(is no file\)", 2),
    "an endless --config": (None, FINETUNE, f"{TRAIN} --config /dev/zero", r"--config /dev/zero: .*\(is no file\)", 2),
    "a --config of 50 MB": (
        put("a.yaml", b"seed: 1\n" * 6_250_000),
        *(FINETUNE, f"{TRAIN} --config {{}}/a.yaml", r"--config .*a.yaml: .*has 50,000,000 bytes", 2),
    ),
    "a UTF-16 --config": (
        put("a.yaml", "seed: 1\n".encode("utf-16")),
        *(FINETUNE, f"{TRAIN} --config {{}}/a.yaml", r"--config .*a.yaml: not UTF-8", 2),
    ),
    "a --config that is no YAML": (*config("seed: [1\nx"), r"--config .*a.yaml: not YAML .*line 2", 2),
    "a --config that is a list": (*config("- seed"), r"--config .*a.yaml: should hold flags", 2),
    "an empty --config": (*config(""), r"--config .*a.yaml: should hold flags", 2),
    "a --config of nine to the ninth words": (*config(BOMB), r"--config .*a.yaml: not YAML \(tags, anchors and", 2),
    "a bomb within a flag": (*config(f"seed: {json.dumps(BOMB)}"), r"a.yaml: seed a: &a .*should be a whole number", 2),
    "a --config that runs code": (*config(f"seed: {TOUCH}"), r"--config .*a.yaml: not YAML \(tags,", 2),
    "a --config that runs code by a list": (
        *config(f"lora.targets: {TOUCH}"),
        r"not YAML \(tags, .*line 1, column 1",
        2,
    ),
    "code within a flag": (*config(f'seed: "{TOUCH}"'), r"a.yaml: seed !!python/\S+ .*: should be a whole number", 2),
    "a flag twice in --config": (*config("seed: 1\nseed: 2\n"), r"a.yaml: not YAML \('seed' is there twice.*line 2", 2),
    "a flag nested and with a dot": (*config("lora: {r: 2}\nlora.r: 4"), r"a.yaml: lora.r is there twice", 2),
    "a --config nested to 10,000 levels": (*config("a: " + "[" * 10**4), r"--config .*a.yaml: not YAML", 2),
    "a --config nested to 10,000 maps": (*config("{a: " * 10**4), r"--config .*a.yaml: not YAML", 2),
    "a date that there is not in --config": (*config("seed: 2001-99-99"), r"a.yaml: not YAML \(month must be", 2),
    "a number without a digit in --config": (*config("seed: 0b_"), r"a.yaml: not YAML \(invalid literal", 2),
    "an unknown flag in --config": (*config("lora: {rank: 2}"), r"a.yaml: lora.rank: no such flag. Did you mean", 2),
    "a list for a flag in --config": (*config("seed: [1, 2]"), r"a.yaml: seed \[1, 2\]: should be a whole number", 2),
    "a number for a key in --config": (*config("1: {2: 3}"), r"a.yaml: 1.2: no such flag", 2),
    "a map for a path in --config": (*config("data_dir: {x: 1}"), r"a.yaml: data_dir.x: no such flag", 2),
    "NUL in a path in --config": (
        write("a.yaml", 'out_dir: "a\\0b"'),
        *(
            FINETUNE,
            f"{CHECKPOINT} --data_dir {{}}/data --config {{}}/a.yaml",
            r"a.yaml: out_dir a b: should be a path",
            2,
        ),
    ),
    "a lone surrogate in --config": (*config('logger: "\\ud800"'), r"a.yaml: (logger|not YAML)", 2),
    "a value for nothing": (None, FINETUNE, f"{TRAIN} --seed", r"--seed: needs a value", 2),
    "a word too many": (None, BASE, f"{ASK} there", r"'there' belongs to no flag", 2),
    "no source": (None, JSON, "--data_dir {}/new", r"--source: needed", 2),
    "YAML tags for a number": (
        None,
        BASE,
        [*ASK.split(), "--seed", "!!timestamp x"],
        r"--seed !!timestamp x: should be",
        2,
    ),
}

FOLDERS = {
    "a folder for records": (folder("records.json"), JSON, PREPARE, r"records.json: cannot be read \(is no file\)"),
    "a pipe for records": (pipe("records.json"), JSON, PREPARE, r"records.json: cannot be read \(is no file\)"),
    "a device for records": (link("records.json", "/dev/zero"), JSON, PREPARE, r"records.json: .*\(is no file\)"),
    "a terminal for records": (
        None,
        JSON,
        PREPARE.replace("{}/records.json", "/dev/tty"),
        r"/dev/tty: .*\(is no file\)",
    ),
    "a link loop for records": (
        link("records.json", "records.json"),
        JSON,
        PREPARE,
        r"--source .*records.json: Too many",
        2,
    ),
    "a link to nothing for records": (
        link("records.json", "{}/gone"),
        JSON,
        PREPARE,
        r"records.json: .*\(No such file",
    ),
    "a pipe for prompts": (pipe("a.txt"), BASE, f"{CHECKPOINT} --prompt_file {{}}/a.txt", r"a.txt: .*\(is no file\)"),
    "a folder for prompts": (None, BASE, f"{CHECKPOINT} --prompt_file {{}}/data", r"data: .*\(is no file\)"),
    "no prompts file": (None, BASE, f"{CHECKPOINT} --prompt_file {{}}/none", r"none: .*\(No such file.*--prompt_file"),
    "a folder for a text": (
        None,
        PERPLEXITY,
        f"{CHECKPOINT} --source {{}}/data",
        r"data: cannot be read \(is no file\)",
    ),
    "a folder for metrics": (folder("metrics.csv"), PLOT, DRAW, r"metrics.csv: .*\(is no file\).*--out_dir"),
    "a pipe for metrics": (pipe("metrics.csv"), PLOT, DRAW, r"metrics.csv: cannot be read \(is no file\)"),
    "a pipe for --config": (pipe("a.yaml"), FINETUNE, f"{TRAIN} --config {{}}/a.yaml", r"--config .*\(is no file\)", 2),
    "a file for a model": (
        None,
        BASE,
        ASK.replace("/checkpoint", "/records.json"),
        r"records.json: no (config|tokenizer).json",
    ),
    "a file for a set": (None, FINETUNE, TRAIN.replace("/data ", "/records.json "), r"records.json: no prepared set"),
    "a file for a LoRA": (
        None,
        LORA,
        ASK_LORA.replace("/lora", "/records.json"),
        r"records.json: no adapter_config.json",
    ),
    "a folder in a file": (
        None,
        *(JSON, PREPARE.replace("/new", "/records.json/new"), r"--data_dir .*records.json/new: Not a directory", 2),
    ),
    "a run in a file": (
        None,
        FINETUNE,
        TRAIN.replace("/out", "/records.json/out"),
        r"--out_dir .*: Not a directory",
        2,
    ),
    "a merge into a file": (
        None,
        MERGE,
        "--lora_path {}/lora --out_dir {}/records.json",
        r"records.json: exists already",
    ),
    "a merge below a file": (
        None,
        *(MERGE, "--lora_path {}/lora --out_dir {}/records.json/x", r"--out_dir .*: Not a directory", 2),
    ),
    "a picture below a file": (None, PLOT, "--runs {} --out {}/records.json/a.png", r"--out .*: Not a directory", 2),
    "a comparison into a file": (
        None,
        *(COMPARE, SIDES.replace("/new", "/records.json"), r"--out_dir .*records.json: is a file", 2),
    ),
    "results into a file that is there": (
        None,
        *(HARNESS, f"{TASKS} --out_file {{}}/records.json", r"--out_file .*records.json: exists already", 2),
    ),
    "a set where nothing can be written": (None, JSON, PREPARE.replace("{}/new", "/proc/new"), r"/proc/"),
    "a set where even root cannot write": (None, JSON, PREPARE.replace("{}/new", "/sys/new"), r"/sys/"),
    "a run where nothing can be written": (None, FINETUNE, TRAIN.replace("{}/out", "/proc/out"), r"/proc/out"),
    "a merge where nothing can be written": (None, MERGE, "--lora_path {}/lora --out_dir /proc/new", r"/proc/"),
    "a LoRA where nothing can be written": (None, COMBINE, "--lora_path {}/lora --out_dir /proc/new", r"/proc/"),
    "a link loop for data_dir": (
        link("new", "new"),
        JSON,
        PREPARE,
        r"--data_dir .*new: Too many levels of symbolic",
        2,
    ),
    "a link loop for out_dir": (
        link("out", "out"),
        FINETUNE,
        TRAIN,
        r"--out_dir .*out: Too many levels of symbolic",
        2,
    ),
    "a link loop in front of out_dir": (
        link("out", "out"),
        *(FINETUNE, TRAIN.replace("/out", "/out/a"), r"--out_dir .*out/a: Too many levels of symbolic links", 2),
    ),
    "a link loop for a model": (
        link("loop", "loop"),
        BASE,
        ASK.replace("/checkpoint", "/loop"),
        r"--checkpoint_dir .*Too",
        2,
    ),
    "a link loop for a merge": (
        link("new", "new"),
        *(MERGE, "--lora_path {}/lora --out_dir {}/new", r"--out_dir .*new: Too many levels", 2),
    ),
    "two links in a circle for a LoRA": (
        lambda p: (link("a", "{}/b")(p), link("b", "{}/a")(p)),
        *(LORA, ASK_LORA.replace("/lora", "/a"), r"--lora_path .*a: Too many levels", 2),
    ),
    "a link loop in a run": (link("metrics.csv", "metrics.csv"), PLOT, DRAW, r"metrics.csv: cannot be read \(Too many"),
    "the model's folder for a run": (
        None,
        FINETUNE,
        TRAIN.replace("/out", "/checkpoint"),
        r"checkpoint: holds another run",
    ),
    "the model's folder for a set": (
        None,
        JSON,
        PREPARE.replace("{}/new", "{}/checkpoint"),
        r"checkpoint: exists already",
    ),
    "the LoRA's folder for a merge": (None, MERGE, "--lora_path {}/lora --out_dir {}/lora", r"lora: exists already"),
    "the source's folder for a set": (None, JSON, PREPARE.replace("{}/new", "{}"), r": exists already"),
    "a set's folder that holds its source too": (
        lambda p: (p / "records.json").rename(p / "data/records.json"),
        *(JSON, PREPARE.replace("/records", "/data/records").replace("/new", "/data"), r"data: exists already"),
    ),
    "a folder with another meta.json": (
        lambda p: (p / "checkpoint/meta.json").write_text("{}"),
        *(JSON, PREPARE.replace("/new", "/checkpoint"), r"checkpoint: exists already"),
    ),
    "a picture that is a folder": (
        lambda p: (write("metrics.csv", f"{HEADER}\n1,,1,1,1,1\n")(p), folder("new.png")(p), write("new.png/a", "")(p)),
        *(PLOT, DRAW, r"new.png: is there, and is something else"),
    ),
    "a picture that is a pipe": (
        lambda p: (write("metrics.csv", f"{HEADER}\n1,,1,1,1,1\n")(p), pipe("new.png")(p)),
        *(PLOT, DRAW, r"new.png: is there, and is something else"),
    ),
    "an empty path to read": (
        None,
        JSON,
        [*PREPARE.split(), "--source", ""],
        r"--source : is empty, should be a path",
        2,
    ),
    "an empty path to write": (
        None,
        FINETUNE,
        [*TRAIN.split(), "--out_dir="],
        r"--out_dir : is empty, should be a path",
        2,
    ),
    "an empty path in a list": (
        None,
        LORA,
        ["--lora_path", "['']", "--prompt", "a"],
        r"--lora_path \[\"\"\]: is empty",
        2,
    ),
    "a path of 5,000 characters": (
        None,
        JSON,
        f"{PREPARE} --source /{LONG}",
        r"--source /x+ ... x+: File name too long",
        2,
    ),
    "a path of 5,000 characters to write": (None, FINETUNE, f"{TRAIN} --out_dir {LONG}", r"--out_dir x+.*too long", 2),
    "a path of 5,000 folders": (
        None,
        BASE,
        f"{ASK} --checkpoint_dir {'a/' * 5000}",
        r"--checkpoint_dir a/.*too long",
        2,
    ),
    "a path with a newline": (
        None,
        JSON,
        [*PREPARE.split(), "--source", "{}/a\nb.json"],
        r"a b.json: .*\(No such file",
    ),
    "a path with NUL": (None, JSON, [*PREPARE.split(), "--source", "{}/a\0b"], r"--source .*a b: should be a path", 2),
    "a path with an escape of a terminal": (
        None,
        BASE,
        [*ASK.split(), "--checkpoint_dir", "\x1b[2J"],
        r"^error: \[2J: no",
    ),
    "no folder of .pth": (None, META, "--source {}/none --out_dir {}/new", r"none.params.json: cannot be read"),
    "a folder for a .pth": (None, LIT, "--source {}/data --out_dir {}/new", r"data: "),
    "a folder for a GGUF": (None, GGUF, "--source {}/data --out_dir {}/new", r"data: "),
    "no folder to upload": (None, UPLOAD, "--path {}/none --repo_id me/x", r"none: no such folder. Check --path"),
    "a folder of something else to upload": (
        None,
        UPLOAD,
        "--path {}/data --repo_id me/x",
        r"data: holds no LoRA, adapter",
    ),
}

CASES = RECORDS | FLAGS | FOLDERS


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_line_and_nothing_touched(place: Path, monkeypatch, capsys, case: tuple) -> None:
    assert_refused(place, case, monkeypatch, capsys)
    assert not (place / "ran").exists()


def test_the_tables_are_long_enough_and_cover_all_scripts() -> None:
    assert len(CASES) == len(RECORDS) + len(FLAGS) + len(FOLDERS) >= 200


def run(script: str, words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, *(word.replace("{}", str(place)) for word in words)])
    cli.run(load_script(script).main)


ROWS = [{"instruction": f"a {n}", "input": "ä" * (n % 2), "output": "b" * n} for n in range(5)]
CSV = "instruction,input,output\n" + "".join(",".join(row.values()) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "JSON with a BOM": ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        "JSON in CRLF": ("a.json", json.dumps(ROWS, indent=1).replace("\n", "\r\n").encode()),
        "JSONL with a BOM, in CRLF": (
            "a.jsonl",
            b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
        ),
        "CSV with a BOM, in CRLF, as Windows writes it": (
            "a.csv",
            b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode(),
        ),
        "CSV with a column of numbers that has no name, as pandas writes it": (
            "a.csv",
            "\n".join(f"{n - 1 if n else ''},{row}" for n, row in enumerate(CSV.splitlines())).encode(),
        ),
        "CSV with empty columns at its end, as spreadsheets write it": (
            "a.csv",
            "\n".join(f"{row},," for row in CSV.splitlines()).encode(),
        ),
        "JSONL with 50 MB that nobody reads": (
            "a.jsonl",
            "\n".join(json.dumps(row | {"html": "x" * 10_000_000}) for row in ROWS).encode(),
        ),
        "CSV with a field over the csv module's limit": (
            "a.csv",
            "\n".join(f"{row},{'x' * 200_000 if n else 'html'}" for n, row in enumerate(CSV.splitlines())).encode(),
        ),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_odd_but_good_is_read(place: Path, monkeypatch, name: str, content: tuple[str, bytes]) -> None:
    """The same samples as from plain JSON."""
    (place / "plain.json").write_text(json.dumps(ROWS))
    (place / content[0]).write_bytes(content[1])
    for source, data_dir in (("plain.json", "plain"), (content[0], "odd")):
        flags = [*CHECKPOINT.split(), "--source", f"{{}}/{source}", "--data_dir", f"{{}}/{data_dir}", "--val_size", "1"]
        run(JSON, flags, place, monkeypatch)
    for part in ("train", "val"):
        file = f"{part}.safetensors"
        assert (place / "plain" / file).read_bytes() == (place / "odd" / file).read_bytes()


@pytest.mark.parametrize(
    "prompt",
    {
        "NUL": "a\0b",
        "escape": "\x1b[2J",
        "tag": "!!timestamp x",
        "code": "!!python/name:os.system",
        "anchor": "{a: &b c}",
        "bomb": BOMB,
        "JSON": '{"a": 1}',
        "list": "[1, 2]",
        "half a list": "[1, 2",
        "brackets": "[" * 60_000,
        "no date": "2001-99-99",
        "date": "2001-01-01",
        "no number": "0b_",
        "digits": "1" * 5000,
        "marks": "---",
        "heading": "# A title",
        "long": "a: é\n" * 20_000,
    }.items(),
    ids=lambda item: item[0],
)
def test_a_prompt_may_be_any_text(prompt: tuple[str, str]) -> None:
    assert read(load_script(BASE).main, [f"--prompt={prompt[1]}"])[0]["prompt"] == prompt[1]


def test_a_prompt_with_nul_is_answered(place: Path, monkeypatch, capsys) -> None:
    run(BASE, [*ASK.split(), "--prompt", "a\0b", "--temperature", "0"], place, monkeypatch)
    assert "Memory used" in capsys.readouterr().err


def test_a_draft_may_be_the_model_itself(place: Path, monkeypatch, capsys) -> None:
    answers = []
    for flags in ([], ["--draft_checkpoint_dir", "{}/checkpoint"]):
        run(BASE, [*ASK.split(), "--temperature", "0", "--max_new_tokens", "8", *flags], place, monkeypatch)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("there", ["a folder", "a pipe", "a file"])
def test_a_file_never_takes_the_place_of_something_else(tmp_path: Path, there: str) -> None:
    """/save of the chat into a folder would have removed the folder with all that is in it."""
    path = tmp_path / "path"
    if there == "a pipe":
        os.mkfifo(path)
    else:
        (path if there == "a file" else path / "a").parent.mkdir(exist_ok=True)
        (path if there == "a file" else path / "a").write_text("precious")

    def replace() -> None:
        with replacing(path) as temporary:
            temporary.mkdir() if there == "a file" else temporary.write_text("new")

    with pytest.raises(FileExistsError, match="something else"):
        replace()
    assert path.is_fifo() or (path if there == "a file" else path / "a").read_text() == "precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["path"]
