"""Wrong calls: values that a flag does not take, flags that do not go together, broken --config."""

# ruff: noqa: F811, pytest finds the fixture `place` by its name

from pathlib import Path

import pytest
from bad_input import (
    ASK,
    ASK_LORA,
    BASE,
    CHECKPOINT,
    FINETUNE,
    JSON,
    LORA,
    PREPARE,
    TRAIN,
    TRAIN_ADAPTER,
    assert_refused,
    place,  # noqa: F401
    write,
)
from conftest import load_script

from lit_llama.errors import UsageError
from lit_llama.runtime.cli import parse

FULL, CHAT = "finetune/full.py", "generate/chat.py"
COMBINE, MEMORY = "scripts/combine_loras.py", "scripts/estimate_memory.py"
UPLOAD = "scripts/upload.py"
PERPLEXITY, COMPARE = "evaluate/perplexity.py", "evaluate/compare.py"
HARNESS = "evaluate/harness.py"
SCORE = f"{CHECKPOINT} --source {{}}/records.json"
SIDES = "--models {}/checkpoint --models {}/lora --source {}/records.json --out_dir {}/new"
TASKS = f"{CHECKPOINT} --tasks a --include_path {{}}/tasks"

# script, flag, value, what it should be
VALUES = [
    (BASE, "max_new_tokens", "-1", "INT >=0"),
    (BASE, "temperature", "-1", "FLOAT >=0"),
    (BASE, "top_p", "2", "FLOAT >0 and <=1"),
    (BASE, "quantize", "nf4", "int8|int4"),
    (BASE, "precision", "bf16-mixed", "auto|bf16-true|32-true"),
    (FINETUNE, "seed", ".nan", "INT"),
    (FINETUNE, "devices", "0", "INT >0"),
    (FINETUNE, "quantize", "int8", "nf4|fp8"),
    (FINETUNE, "logger", "excel", "tensorboard|wandb|mlflow"),
    (FINETUNE, "lora.r", "0", "INT >0"),
    (FINETUNE, "lora.dropout", "1", "FLOAT >=0 and <1"),
    (FINETUNE, "adapter.start_layer", "-1", "INT >=0"),
    (FINETUNE, "train.learning_rate", "-1", "FLOAT >=0"),
    (FINETUNE, "train.beta1", "1", "FLOAT >=0 and <1"),
    (FINETUNE, "train.max_steps", "0", "INT >0"),
    (FINETUNE, "train.warmup_epochs", ".nan", "FLOAT"),
    (FINETUNE, "train.schedule", "linear", "cosine|constant"),
    (FINETUNE, "train.eval_interval", "0", "INT >0"),
    (TRAIN_ADAPTER, "adapter.prompt_length", "0", "INT >0"),
    (CHAT, "context", "-1", "INT >0"),
]


@pytest.mark.parametrize("case", VALUES, ids=lambda case: " ".join(case[:3]))
def test_a_value_that_a_flag_does_not_take(case: tuple[str, str, str, str]) -> None:
    script, flag, value, expected = case
    with pytest.raises(UsageError) as error:
        parse(load_script(script).main, [f"--{flag}", value])
    assert str(error.value) == f"--{flag} {value}: should be {expected} (--help lists all flags)"


# what is wrong: (what breaks it, the script, its flags, what the line says, the exit status)
CASES = {
    "no prompt at all": (None, BASE, CHECKPOINT, r"--prompt, --prompt_file: give one", 2),
    "two kinds of prompt": (
        None,
        *(BASE, f"{ASK} --prompt_file {{}}/a.txt", r"--prompt, --prompt_file: give one", 2),
    ),
    "an unknown template": (None, BASE, f"{ASK} --template vicuna", r"'vicuna'.*alpaca"),
    "quantize in full finetuning": (None, FULL, f"{TRAIN} --quantize nf4", r"--quantize nf4: ", 2),
    "no linear layer": (None, FINETUNE, f"{TRAIN} --lora.targets []", r"--lora.targets", 2),
    "a draft for many prompts": (
        write("prompts.txt", "a\nb\n"),
        BASE,
        f"{CHECKPOINT} --prompt_file {{}}/prompts.txt --draft_checkpoint_dir {{}}/checkpoint",
        *(r"--draft_checkpoint_dir: ", 2),
    ),
    "a draft that is not a folder": (
        None,
        *(BASE, f"{ASK} --draft_checkpoint_dir {{}}/none", r"none: no config.json there"),
    ),
    "the same LoRA twice": (
        None,
        *(LORA, f"{ASK_LORA} --lora_path {{}}/lora", r"--lora_path: .*several different ones", 2),
    ),
    "no LoRA in the list": (None, LORA, "--lora_path [] --prompt Hi", r"--lora_path: should be", 2),
    "a LoRA and an adapter to chat with": (
        None,
        *(CHAT, "--lora_path {}/lora --adapter_path {}/lora", r"--lora_path, --adapter_path: ", 2),
    ),
    "nothing to chat with": (None, CHAT, "", r"--lora_path, --adapter_path: give a model", 2),
    "a chat without room": (
        None,
        *(CHAT, f"{CHECKPOINT} --context 8 --max_new_tokens 8", r"--max_new_tokens 8: ", 2),
    ),
    "a system message for Alpaca's template": (
        None,
        *(CHAT, f"{CHECKPOINT} --template alpaca --system a --max_new_tokens 8", r"--system: ", 2),
    ),
    "val_size of -1": (None, JSON, f"{PREPARE} --val_size -1", r"--val_size -1: ", 2),
    "all records for validation": (None, JSON, f"{PREPARE} --val_size 60", r"--val_size 60: ", 2),
    "samples of a token": (
        None,
        JSON,
        f"{PREPARE} --max_seq_length 1",
        r"Raise --max_seq_length 1",
    ),
    "weights for two of one LoRA": (
        None,
        *(COMBINE, "--lora_path {}/lora --weights [1,2] --out_dir {}/new", r"--weights: ", 2),
    ),
    "no LoRA to combine": (None, COMBINE, "--lora_path [] --out_dir {}/new", r"--weights: ", 2),
    "no model of that name": (None, MEMORY, "--model 8B", r"'8B'.*7B"),
    "no method of that name": (None, MEMORY, "--method ia3", r"--method ia3: ", 2),
    "a device that does not exist": (None, MEMORY, "--device tpu", r"--device tpu: ", 2),
    "a window beyond the context": (None, PERPLEXITY, f"{SCORE} --window 10000", r"--window 10", 2),
    "a stride as wide as the window": (
        None,
        *(PERPLEXITY, f"{SCORE} --window 8 --stride 8", r"--stride below --window", 2),
    ),
    "nothing to score": (None, PERPLEXITY, CHECKPOINT, r"--source, --data_dir: give one", 2),
    "no model to score": (None, PERPLEXITY, "--source {}/records.json", r"--checkpoint_dir, ", 2),
    "no model in the list": (
        None,
        *(COMPARE, "--source {}/records.json --models []", r"--models \[\]: should name", 2),
    ),
    "no model named": (None, COMPARE, "--source {}/records.json", r"required: models", 2),
    "a model twice": (
        None,
        *(COMPARE, f"{SIDES} --models {{}}/lora", r"--models .*none twice", 2),
    ),
    "nothing to compare them on": (
        None,
        *(COMPARE, "--models {}/checkpoint", r"--source, --data_dir, --prompt_file: give one", 2),
    ),
    "a model that is a dataset": (
        None,
        *(COMPARE, f"{SIDES} --models {{}}/data", r"data: no adapter_config.json"),
    ),
    "no tasks": (None, HARNESS, f"{CHECKPOINT} --tasks []", r"--tasks: ", 2),
    "no folder of tasks": (None, HARNESS, TASKS, r"--include_path .*tasks", 2),
    "no owner in a name on the hub": (
        None,
        *(UPLOAD, "--path {}/lora --repo_id mine", r"--repo_id mine: .*owner/name", 2),
    ),
    "a path for a name on the hub": (
        None,
        *(UPLOAD, "--path {}/lora --repo_id ../../x", r"--repo_id ../../x: ", 2),
    ),
    "no --config": (
        None,
        *(FINETUNE, f"{TRAIN} --config {{}}/a.yaml", r"--config .*a.yaml: .*No such file", 2),
    ),
    "a folder for --config": (
        None,
        *(FINETUNE, f"{TRAIN} --config {{}}/data", r"--config .*data: .*Is a directory", 2),
    ),
    "a value for nothing": (None, FINETUNE, f"{TRAIN} --seed", r"--seed: needs a value", 2),
    "a word too many": (None, BASE, f"{ASK} there", r"'there' belongs to no flag", 2),
    "no source": (None, JSON, "--data_dir {}/new", r"required: source", 2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_line_and_nothing_touched(place: Path, monkeypatch, capsys, case: tuple) -> None:
    assert_refused(place, case, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [1\nx", "--config a.yaml: while parsing a flow sequence"),
        ("seed: 2001-99-99", "--seed 2001-99-99: should be INT"),
        ("lora: {rank: 2}", "--config a.yaml: --lora.rank: no such flag. Did you mean --lora.r?"),
        ("1: {2: 3}", "--config a.yaml: --1.2: no such flag"),
        ("seed: !!python/object/apply:os.mkdir ['ran']", "--seed ran: should be INT"),
    ],
)
def test_a_broken_config(text: str, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(text)
    with pytest.raises(UsageError) as error:
        parse(load_script(FINETUNE).main, ["--config", "a.yaml"])
    assert str(error.value).startswith(message)
    assert not Path("ran").exists()
