"""benchmarks/gpu.py runs all of its parts on the CPU, and goes on after one that fails."""

import json
import subprocess
from pathlib import Path

import pytest
import report
import torch
from conftest import ROOT, load_script
from test_kernels import arguments

from lit_llama import UserError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return load_script("benchmarks/gpu.py")


def read(file: Path) -> list[dict]:
    return json.loads(file.read_text("utf-8"))["figures"]


def test_all_parts_run_on_the_cpu(gpu, tmp_path: Path, python: str) -> None:
    file = tmp_path / "gpu-tiny-cpu.json"
    flags = ["--name", "tiny", "--device", "cpu", "--steps", "1", "--out", str(file)]
    command = [python, str(ROOT / "benchmarks/gpu.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = read(file)
    # what is saved is printed, in the same order
    printed = [line.split("s  ", 1)[1].split(":")[0] for line in done.stdout.splitlines()]
    assert [line["part"] for line in lines] == printed
    known = [part for part in gpu.PARTS if part != "decode-compiled"]
    assert list(dict.fromkeys(printed)) == ["environment", *known, "end"]
    # fp8 on the CPU came with torch 2.13
    fp8 = [] if torch.__version__ >= (2, 13) else ["agree-fp8", "lora-fp8"]
    assert lines[-1]["failed"] == fp8, done.stdout
    assert done.returncode == bool(fp8)
    lora = next(line for line in lines if line["part"] == "lora")
    assert lora["tokens_per_s"] > 0
    assert lora["estimated_gb"] > 0
    assert sum("kernel" in line for line in lines if line["part"] == "decode") > 5
    compared = [line["kernel"] for line in lines if line["part"] == "kernels" and "kernel" in line]
    assert compared == list(arguments(4))
    report.main(tmp_path, tmp_path / "RESULTS.md")
    page = (tmp_path / "RESULTS.md").read_text("utf-8")
    assert "## Every path, tiny with random weights, CPU" in page
    assert f"| lora | tokens_per_s {lora['tokens_per_s']}" in page


def test_peers_are_measured_on_the_same_weights(gpu, tmp_path: Path, python: str) -> None:
    file = tmp_path / "peers.json"
    flags = ["--peers", "--name", "tiny", "--device", "cpu", "--steps", "1", "--out", str(file)]
    command = [python, str(ROOT / "benchmarks/gpu.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for part, peer in (("train", "peft"), ("decode", "transformers")):
        lines = [line for line in read(file) if line["part"] == f"{part}-beside-peers"]
        measured = [line["contender"] for line in lines if "tokens_per_s" in line]
        assert {"lit-llama", peer} <= set(measured)
        assert len(measured) == len(lines) == 2 * len(set(measured))  # two rounds
        losses = [line["first_loss"] for line in lines if part == "train"]
        assert not losses or max(losses) - min(losses) < 0.03  # bf16


def test_a_part_that_fails_or_takes_too_long(gpu, tmp_path: Path, monkeypatch) -> None:
    def broken(bench):
        yield dict(first=1)
        raise RuntimeError("two\nlines")

    def endless(bench):
        while True:
            yield from ()

    def fine(bench):
        yield dict(last=2.00004)

    parts = {"broken": (1, broken), "endless": (0.1, endless), "fine": (1, fine)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    file = tmp_path / "gpu.json"
    with pytest.raises(SystemExit):
        gpu.main("tiny", "cpu", out=file)
    first, error, late, last, end = read(file)[1:]
    assert (first["first"], last["last"]) == (1, 2.0)
    assert error["error"] == "RuntimeError: two lines"
    assert "in broken" in error["traceback"]
    assert late["error"] == "not done after 1 s"
    assert end["failed"] == ["broken", "endless"]


def test_wrong_calls(gpu) -> None:
    with pytest.raises(UserError, match="--device cuda: torch finds no GPU"):
        gpu.main()
    with pytest.raises(UserError, match=r"--parts lorra: unknown. Known: limits, "):
        gpu.main("tiny", "cpu", parts=("lorra",))
    with pytest.raises(UserError, match="unknown model name '8B'"):
        gpu.main("8B", "cpu")


def test_all_parts_together_have_a_budget(gpu, tmp_path: Path, monkeypatch) -> None:
    assert gpu.BUDGET + gpu.PEERS_BUDGET <= 600

    def endless(bench):
        while True:
            yield from ()

    bench = gpu.Bench(gpu.TINY, torch.device("cpu"), 1, tmp_path / "gpu.json", budget=0.5)
    bench.report("environment", model="tiny", date="today")
    bench.on_gpu = True
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    assert not gpu.run_part("endless", bench, 60, endless)
    assert read(bench.out)[-1]["error"].startswith("not done after 1")
