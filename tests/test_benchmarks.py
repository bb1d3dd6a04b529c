"""The benchmarks' arithmetic and report; their workers on a tiny model. No figure is looked at."""

import json
import subprocess
import sys
from pathlib import Path

import common
import pytest
import report
from conftest import ROOT, load_script

from lit_llama import UserError

FIGURES = {
    "a": [{"speed": 4.0}, {"speed": 9.0}, {"speed": 6.0}],
    "b": [{"speed": 1.0}, {"speed": 3.0}, {"speed": 2.0}],
}


def test_medians_and_ratios() -> None:
    assert common.median(FIGURES, "a", "speed") == 6.0
    assert common.ratios(FIGURES, "speed", [("a", "b"), ("a", "c")]) == [
        "a: 3.00 times the speed of b"
    ]


def test_contenders_take_turns() -> None:
    order = []
    figures = common.alternate(
        ["x", "y"], 2, lambda name: order.append(name) or f'noise\n{{"n": {len(order)}}}'
    )
    assert order == ["x", "y", "x", "y"]
    assert figures == {"x": [{"n": 1}, {"n": 3}], "y": [{"n": 2}, {"n": 4}]}


def test_contenders_that_are_not_known_or_installed() -> None:
    known = {"ours": "lit_llama", "theirs": "no-such-package"}
    assert common.chosen((), known) == ("ours",)
    with pytest.raises(UserError, match=r"no 'other'. There are: ours, theirs"):
        common.chosen(("other",), known)


def test_report(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    table = common.table(["contender", "speed"], [["a", "6"], ["b", "2"]])
    common.save(
        "finetune", "Finetuning beside peers", "A tiny model.", table, ["a: 3.00 times"], FIGURES
    )
    written = json.loads((tmp_path / "finetune-cpu.json").read_text())
    assert written["figures"] == FIGURES
    assert "torch" in written["versions"]
    report.main(tmp_path, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| contender | speed |\n| --- | --- |\n| a | 6 |\n| b | 2 |\n\n- a: 3.00 times\n" in text
    assert "## Finetuning beside peers, GPU\n\nnot measured" in text
    assert "## Loading" not in text


def test_results_are_the_report_of_their_files(tmp_path: Path) -> None:
    report.main(out=tmp_path / "RESULTS.md")
    assert (tmp_path / "RESULTS.md").read_text() == (ROOT / "benchmarks/RESULTS.md").read_text()


@pytest.mark.parametrize(
    ("result", "page"),
    [
        ("rank", "lora_explained"),
        ("many_loras", "many_loras"),
        ("flags", "performance"),
        ("generate", "performance"),
    ],
)
def test_tables_in_the_guides_are_those_that_were_measured(result: str, page: str) -> None:
    measured = json.loads((ROOT / f"benchmarks/results/{result}-cpu.json").read_text("utf-8"))
    assert measured["table"] in (ROOT / f"howto/{page}.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("script", "worker", "more"),
    [
        ("finetune", "lit-llama LoRA", ["--steps", "5"]),
        ("finetune", "peft LoRA", ["--steps", "5"]),
        ("generate", "lit-llama bf16, 8 prompts", ["--new_tokens", "4"]),
        ("generate", "transformers bf16", ["--new_tokens", "4"]),
        ("load", "transformers, a LoRA merged", []),
        ("many_loras", "1 LoRA for 8 rows", []),
    ],
)
def test_workers(
    script: str,
    worker: str,
    more: list[str],
    tiny_data: Path,
    tiny_checkpoint: Path,
    tmp_path,
    python: str,
) -> None:
    flags = ["--worker", worker, "--checkpoint_dir", str(tiny_checkpoint), *more]
    if script == "finetune":
        flags += ["--data_dir", str(tiny_data)]
    if script in ("load", "many_loras"):
        from lit_llama import load_model
        from lit_llama.lora import LoRAConfig, apply_lora, save_lora

        model, config = load_model(tiny_checkpoint), LoRAConfig()
        apply_lora(model, config)
        place = tmp_path if script == "load" else tmp_path / "0"
        save_lora(dict(model.named_parameters()), place, config)
        flags += ["--lora_path" if script == "load" else "--lora_dir", str(tmp_path)]
    command = [python, str(ROOT / f"benchmarks/{script}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert all(value > 0 for value in figures.values())
    assert len(figures) in (2, 3, 5)


def test_flags(
    tiny_checkpoint: Path, records_file: Path, tmp_path: Path, monkeypatch, python: str
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr("common.RESULTS", tmp_path)
    runs = ("lora --train.micro_batch_tokens 512",)
    load_script("benchmarks/flags.py").main(
        tiny_checkpoint, records_file, steps=2, batch_size=4, runs=runs
    )
    (figures,) = json.loads((tmp_path / "flags-cpu.json").read_text())["figures"].values()
    assert figures["tokens_per_second"] > 0
    assert 0.5 < figures["estimated_bytes"] / figures["peak_memory_bytes"] < 2
