"""Random damage to records, flags and texts: each try ends well or in a UserError of one line.

FUZZ_TRIES=650 is the campaign that howto/reliability.md tells of.
"""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import load_script
from fuzzing import BYTES, TEXTS, any_value, attack, json_bytes, mutate_bytes, mutate_json

from lit_llama import Tokenizer
from lit_llama.flags import read
from lit_llama.generation import Sampling, read_prompts
from lit_llama.plots import PANELS, draw, read_metrics
from lit_llama.prompts import encode_prompt, get_template, stop_ids
from lit_llama.records import Columns, encode_answers, read_conversations
from lit_llama.training import TrainArgs

Target = tuple[Callable[[Random], object], Callable[[], object]]

RECORDS = [{"instruction": f"Count to {n}.", "input": "from one" * (n % 2), "output": "one two " * n} for n in range(4)]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <|im_end|>"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]
JINJA = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
METRICS = ",".join(["step", "samples", *PANELS, "val_loss"])
YAML = """\
out_dir: out
lora:
  r: 4
  targets: [q_proj, v_proj]
adapter: null
train: {epochs: 2, learning_rate: 3e-4, fast_paths: yes}
train.beta1: .9
checkpoint_dir: 'a # b'
seed: 0x10
resume: false
"""
WORDS = {
    "finetune/lora.py": "--out_dir a --lora.r 4 --lora.targets [q_proj] --adapter.start_layer 1 --train.epochs 2 "
    "--seed 1 --resume --train.learning_rate 1e-3 --train.schedule cosine --quantize nf4",
    "finetune/full.py": "--out_dir a --precision 32-true --train.max_steps 5 --train.beta2 0.9 --devices 2",
    "generate/base.py": "--checkpoint_dir a --prompt Hi --temperature 0.5 --top_k 3 --top_p 0.5 --compile false",
    "generate/lora.py": "--lora_path a --lora_path [b,c] --prompt Hi --num_samples 2 --fast_paths",
    "scripts/prepare_json.py": "--source a.json --columns.output b --val_size 3 --mask_prompt false --template none",
    "scripts/merge_lora.py": "--lora_path a --out_dir b --precision 32-true",
    "scripts/combine_loras.py": "--lora_path [a,b] --weights [0.5,1e-1] --out_dir c",
    "scripts/plot_metrics.py": "a b --out c.png",
}


def words_of(script: str, random: Random) -> list[str]:
    """Its words with one to three changes: of letters, of whole words, of their order."""
    words = WORDS[script].split()
    for _ in range(random.randint(1, 3)):
        at, kind = random.randrange(len(words)), random.randrange(6)
        if kind == 0:
            words[at] = mutate_bytes(words[at].encode("utf-8", "surrogatepass"), random, 1).decode(
                "utf-8", "surrogateescape"
            )
        elif kind == 1:
            words[at] = random.choice([*TEXTS, str(any_value(random)), json.dumps(any_value(random))])
        elif kind == 2:
            words.insert(at, random.choice([*TEXTS, *words]))
        elif kind == 3:
            words[at] = f"{words[at]}={random.choice([*TEXTS, *words])}"
        elif kind == 4 and len(words) > 1:
            del words[at]
        else:
            words[at] = random.choice(
                ["&a [*a]", "!!timestamp x", "0b_", "[" * 3000, "1" * 5000, "{a: b}", "*a", "<<: 1"]
            )
    return words


@pytest.fixture
def targets(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Target]:
    """By name: what writes a damaged input, and what reads it."""
    monkeypatch.chdir(tmp_path)
    tokenizer, found = Tokenizer(tiny_checkpoint), {}
    state: dict[str, Any] = {}

    def file_target(name: str, content: Callable[[Random], bytes], reader: Callable[[Path], object]) -> None:
        file = tmp_path / name.replace(" ", "_")
        found[name] = (lambda random: file.write_bytes(content(random)), lambda: reader(file))

    def tokenized(file: Path, template: str = "alpaca") -> None:
        how = get_template(template, tokenizer)
        for place, messages in read_conversations(file, Columns()).items():
            list(encode_answers(messages, how, tokenizer, 0, place))

    def csv_bytes(random: Random) -> bytes:
        rows = [",".join(record.values()) for record in RECORDS]
        return mutate_bytes("\n".join(["instruction,input,output", *rows, '"a ""b"", c",,d', ""]).encode(), random)

    def jsonl_bytes(random: Random) -> bytes:
        return b"\n".join(json_bytes(mutate_json(record, random), random) for record in RECORDS)

    def metrics_bytes(random: Random) -> bytes:
        rows = [
            ",".join(str(random.choice([n, n / 7])) for _ in METRICS.split(",")) for n in range(random.randint(1, 80))
        ]
        return mutate_bytes("\n".join([METRICS, *rows, ""]).encode(), random)

    def drawn(file: Path) -> None:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        figure = draw({"run": read_metrics(file)})
        figure.draw_without_rendering()

    file_target("records.json", lambda random: json_bytes(mutate_json(RECORDS, random), random), tokenized)
    file_target("bytes.json", lambda random: mutate_bytes(json.dumps(RECORDS).encode(), random), tokenized)
    file_target("records.jsonl", jsonl_bytes, tokenized)
    file_target("records.csv", csv_bytes, tokenized)
    file_target(
        "messages.json",
        lambda random: json_bytes(mutate_json([{"messages": TURNS}] * 2, random), random),
        lambda file: tokenized(file, "chatml"),
    )
    file_target("metrics.csv", metrics_bytes, drawn)
    file_target(
        "prompts.txt", lambda random: mutate_bytes(b"One prompt\n\n<|im_end|> another\n" * 2, random), read_prompts
    )

    lora = load_script("finetune/lora.py").main
    file_target(
        "config.yaml", lambda random: mutate_bytes(YAML.encode(), random), lambda f: read(lora, ["--config", str(f)])
    )
    flags = {"out_dir": "a", "lora": {"r": 2, "targets": ["q_proj"]}, "train": {"epochs": 2, "beta1": 0.5}, "seed": 3}
    file_target(
        "values.yaml",
        lambda random: json_bytes(mutate_json(flags, random), random),
        lambda file: read(lora, ["--config", str(file)]),
    )

    def chat_template(file: Path) -> None:
        tokenizer.chat_template = file.read_text("utf-8", "replace")
        how = get_template("chat", tokenizer)
        encode_prompt(how, tokenizer, TURNS[:2])

    file_target("chat_template.jinja", lambda random: mutate_bytes(JINJA.encode(), random), chat_template)

    def text(random: Random) -> None:
        parts = [*TEXTS, *tokenizer.specials, *(part.decode("utf-8", "replace") for part in BYTES)]
        state["turn"] = {"role": "user", "content": "".join(random.choices(parts, k=random.randint(1, 6)))}

    def rendered() -> None:
        for name in ("alpaca", "chatml", "none"):
            how = get_template(name, tokenizer)
            ids = encode_prompt(how, tokenizer, [state["turn"]])
            before = encode_prompt(how, tokenizer, [{"role": "user", "content": ""}])
            # no text makes a special token
            specials = set(tokenizer.specials.values())
            assert [i for i in ids if i in specials] == [i for i in before if i in specials]
            assert stop_ids(how, tokenizer, None)

    found["texts in templates"] = text, rendered

    def numbers(random: Random) -> None:
        state["numbers"] = [random.choice([any_value(random), random.uniform(-2, 2)]) for _ in range(5)]
        state["numbers"] = [n if type(n) in (int, float) else 1 for n in state["numbers"]]

    def sampling() -> None:
        new, temperature, top_k, top_p, rate = state["numbers"]
        Sampling(new, temperature, top_k, top_p)
        TrainArgs(learning_rate=rate)

    found["numbers"] = numbers, sampling

    for script in WORDS:
        main, positional = load_script(script).main, "runs" if script == "scripts/plot_metrics.py" else None

        def make(random: Random, script: str = script) -> None:
            state["words"] = words_of(script, random)

        def call(main: Callable = main, positional: str | None = positional) -> None:
            with suppress(SystemExit):  # --help, --print_config
                read(main, state["words"], positional)

        found[f"flags of {script}"] = make, call
    return found


NAMES = [
    *("records.json", "bytes.json", "records.jsonl", "records.csv", "messages.json", "metrics.csv", "prompts.txt"),
    *("config.yaml", "values.yaml", "chat_template.jinja", "texts in templates", "numbers"),
    *(f"flags of {script}" for script in WORDS),
]


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_told_in_one_line(targets: dict[str, Target], name: str) -> None:
    read_well = attack(name, *targets[name])
    print(f"{name}: {read_well} read", file=sys.stderr)


def test_all_targets_are_tried_and_read_well_undamaged(targets: dict[str, Target], tmp_path: Path) -> None:
    assert sorted(targets) == sorted(NAMES)
    good = {
        "records.json": json.dumps(RECORDS),
        "bytes.json": json.dumps(RECORDS),
        "records.jsonl": "\n".join(map(json.dumps, RECORDS)),
        "records.csv": "instruction,output\na,b\n",
        "messages.json": json.dumps([{"messages": TURNS}]),
        "metrics.csv": f"{METRICS}\n1,2,3,4,5,6,\n",
        "prompts.txt": "a",
        "config.yaml": YAML,
        "values.yaml": "seed: 1",
        "chat_template.jinja": JINJA,
    }
    for name, content in good.items():
        (tmp_path / name).write_text(content)
        targets[name][1]()
