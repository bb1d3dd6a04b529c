"""Each recipe in finetune/configs calls the script it names and takes the memory it states."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, load_script
from test_estimate_memory import estimate

from lit_llama.errors import UsageError
from lit_llama.runtime.cli import parse

RECIPES = sorted((ROOT / "finetune/configs").glob("*.yaml"))
ESTIMATE, PREPARE = "scripts/estimate_memory.py", "scripts/prepare_alpaca.py"


def commands(recipe: Path) -> dict[str, list[str]]:
    """The commands in a recipe's comment: script -> its flags."""
    found = re.findall(r"^#     python (\S+)(.*)$", recipe.read_text("utf-8"), re.MULTILINE)
    return {script: shlex.split(flags) for script, flags in found}


def called(script: str, words: list[str]) -> dict:
    """The flags of a call by name, those of `args` too."""
    arguments = parse(load_script(script).main, words)
    return arguments | vars(arguments["args"]) if "args" in arguments else arguments


def keys(recipe: Path) -> list[str]:
    """The flags that a recipe sets: `train.epochs` for {"train": {"epochs": 3}}."""
    names = []
    for name, value in yaml.safe_load(recipe.read_text("utf-8")).items():
        names += [f"{name}.{key}" for key in value] if isinstance(value, dict) else [name]
    return names


def test_there_are_recipes() -> None:
    names = "full-7b-4-devices llama-3.2-1b lora-70b-8-devices lora-7b-24gb qlora-7b-12gb"
    assert [recipe.stem for recipe in RECIPES] == [*names.split(), "smollm2-laptop"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_what_its_comment_says(recipe: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    prepare, script, estimates = commands(recipe)
    assert (prepare, estimates) == (PREPARE, ESTIMATE)
    words = commands(recipe)[script]
    assert words == ["--config", str(recipe.relative_to(ROOT))]
    run, default = called(script, words), called(script, [])
    prepared, estimated = (
        called(PREPARE, commands(recipe)[PREPARE]),
        called(ESTIMATE, commands(recipe)[ESTIMATE]),
    )
    assert (run["checkpoint_dir"], run["data_dir"]) == (
        prepared["checkpoint_dir"],
        prepared["data_dir"],
    )
    assert script == f"finetune/{estimated['method']}.py"
    assert run.get("lora", estimated["lora"]) == estimated["lora"]
    assert run["train"].micro_batch_tokens == estimated["micro_batch_tokens"]
    assert run["train"].recompute == estimated["recompute"]
    for name in ("devices", "precision", "quantize"):
        assert run[name] in (estimated[name], "auto")
    for name in keys(recipe):  # only what differs from the defaults
        group, _, leaf = name.rpartition(".")
        values = [getattr(each[group], leaf) if group else each[name] for each in (run, default)]
        assert values[0] != values[1] or name in ("checkpoint_dir", "data_dir"), name
    moved = called(script, [*words, "--seed", "7", "--out_dir", "elsewhere"])
    assert moved["out_dir"] == Path("elsewhere")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_takes_the_memory_that_it_says(recipe: Path, monkeypatch, capsys) -> None:
    text = recipe.read_text("utf-8")
    sizes = estimate(monkeypatch, capsys, *commands(recipe)[ESTIMATE])
    total = sizes["total"]
    if "Python and torch" in sizes:  # is that of this process, and as different as processes are
        total = sum(sizes[name] for name in ("weights", "gradients", "optimizer", "activations"))
    assert re.search(r"Memory.*: (\S+) GB", text)[1] == f"{total / 1e9:.3f}"
    room = float(re.search(r"of (\d+) GB", text)[1])
    assert total < 0.9e9 * room


def test_a_key_that_is_no_flag_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    main = load_script("finetune/lora.py").main
    similar = {"train.epoch": "train.epochs", "lora.target": "lora.targets", "device": "devices"}
    for wrong, right in similar.items():
        file = tmp_path / "recipe.yaml"
        file.write_text(f"{RECIPES[0].read_text('utf-8')}\n{wrong}: 3\n", "utf-8")
        with pytest.raises(UsageError) as error:
            parse(main, ["--config", str(file)])
        problem = f"--{wrong}: no such flag. Did you mean --{right}?"
        assert str(error.value) == f"--config {file}: {problem} (--help lists all flags)"
