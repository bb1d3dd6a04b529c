"""Random damage to records, texts and flags: each try ends well or in a UserError of one line."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import load_script
from fuzzing import BYTES, TEXTS, attack, json_bytes, mutate_bytes, mutate_json

from lit_llama import Tokenizer
from lit_llama.prompts import encode_prompt, get_template, stop_ids
from lit_llama.runtime.cli import parse
from lit_llama.runtime.loggers import METRICS
from lit_llama.runtime.plots import read_metrics
from lit_llama.storage.records import Columns, read_conversations
from lit_llama.storage.samples import encode_answers

Target = tuple[Callable[[Random], object], Callable[[], object]]

RECORDS = [
    {"instruction": f"Count to {n}.", "input": "from one" * (n % 2), "output": "one two " * n}
    for n in range(1, 5)
]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <|im_end|>"},
    {"role": "assistant", "content": "Hi."},
]
CSV = "instruction,input,output\n" + "".join(",".join(row.values()) + "\n" for row in RECORDS)
WORDS = {
    "finetune/lora.py": "--out_dir a --lora.r 4 --lora.targets [q_proj] --adapter.start_layer 1 "
    "--seed 1 --resume --train.learning_rate 1e-3 --train.schedule cosine --quantize nf4",
    "generate/lora.py": "--lora_path a --lora_path [b,c] --prompt Hi --top_p 0.5 --fast_paths",
    "scripts/plot_metrics.py": "a b --out c.png",
}
NAMES = [
    *("records.json", "bytes.json", "records.jsonl", "records.csv", "messages.json"),
    *("metrics.csv", "texts in templates", *WORDS),
]


def mutate_words(words: list[str], random: Random) -> list[str]:
    """One to three words changed, put in, moved or removed."""
    words = list(words)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(words))
        change = random.randrange(4)
        if change == 0:
            words[at] = random.choice(TEXTS)
        elif change == 1:
            words.insert(at, random.choice([*TEXTS, *words]))
        elif change == 2:
            words[at] = f"{words[at]}={random.choice([*TEXTS, *words])}"
        elif len(words) > 1:
            del words[at]
    return words


@pytest.fixture
def targets(tmp_path: Path, tiny_checkpoint: Path) -> dict[str, Target]:
    """By name: what writes a damaged input, and what reads it."""
    tokenizer, found = Tokenizer(tiny_checkpoint), {}
    state: dict[str, Any] = {}

    def add(
        name: str, content: Callable[[Random], bytes], reader: Callable[[Path], object]
    ) -> None:
        file = tmp_path / name
        found[name] = (lambda random: file.write_bytes(content(random)), lambda: reader(file))

    def tokenized(file: Path, name: str = "alpaca") -> None:
        template = get_template(name, tokenizer)
        for place, messages in read_conversations(file, Columns()).items():
            list(encode_answers(messages, template, tokenizer, 0, place))

    def records(random: Random) -> bytes:
        return json_bytes(mutate_json(RECORDS, random), random)

    def lines(random: Random) -> bytes:
        return b"\n".join(json_bytes(mutate_json(row, random), random) for row in RECORDS)

    def messages(random: Random) -> bytes:
        return json_bytes(mutate_json([{"messages": TURNS}] * 2, random), random)

    def metrics(random: Random) -> bytes:
        rows = [",".join(str(random.random()) for _ in METRICS) for _ in range(9)]
        return mutate_bytes("\n".join([",".join(METRICS), *rows, ""]).encode(), random)

    add("records.json", records, tokenized)
    add("bytes.json", lambda random: mutate_bytes(json.dumps(RECORDS).encode(), random), tokenized)
    add("records.jsonl", lines, tokenized)
    add("records.csv", lambda random: mutate_bytes(CSV.encode(), random), tokenized)
    add("messages.json", messages, lambda file: tokenized(file, "chatml"))
    add("metrics.csv", metrics, read_metrics)

    def text(random: Random) -> None:
        parts = [*TEXTS, *tokenizer.specials, *(part.decode("utf-8", "replace") for part in BYTES)]
        state["text"] = "".join(random.choices(parts, k=random.randint(1, 6)))
        state["text"] = state["text"].replace("\ud800", "")

    def rendered() -> None:
        specials = set(tokenizer.specials.values())
        for name in ("alpaca", "chatml", "none"):
            template = get_template(name, tokenizer)
            ids, empty = (
                encode_prompt(template, tokenizer, [{"role": "user", "content": content}])
                for content in (state["text"], "")
            )
            # no text becomes a special token
            assert [i for i in ids if i in specials] == [i for i in empty if i in specials]
            assert stop_ids(template, tokenizer, None)

    found["texts in templates"] = text, rendered

    for script, words in WORDS.items():
        main = load_script(script).main
        positional = "runs" if script == "scripts/plot_metrics.py" else None

        def make(random: Random, words: str = words) -> None:
            state["words"] = mutate_words(words.split(), random)

        def call(main: Callable = main, positional: str | None = positional) -> None:
            with suppress(SystemExit):  # --help, --print_config
                parse(main, state["words"], positional)

        found[script] = make, call
    return found


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_told_in_one_line(targets: dict[str, Target], name: str) -> None:
    attack(name, *targets[name])


def test_all_targets_are_read_well_undamaged(targets: dict[str, Target], tmp_path: Path) -> None:
    assert sorted(targets) == sorted(NAMES)
    good = {
        "records.json": json.dumps(RECORDS),
        "bytes.json": json.dumps(RECORDS),
        "records.jsonl": "\n".join(map(json.dumps, RECORDS)),
        "records.csv": CSV,
        "messages.json": json.dumps([{"messages": TURNS}]),
        "metrics.csv": "\n".join([",".join(METRICS), ",".join("1" for _ in METRICS)]),
    }
    for name, content in good.items():
        (tmp_path / name).write_text(content)
        targets[name][1]()
