"""The benchmarks' arithmetic and report; their workers on a tiny model. No figure is looked at."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import common
import pytest
import report
import torch
from conftest import ROOT, load_script
from torch.utils._python_dispatch import TorchDispatchMode

from lit_llama import UserError
from lit_llama.runtime import cli

FIGURES = {
    "a": [{"speed": 4.0}, {"speed": 9.0}, {"speed": 6.0}],
    "b": [{"speed": 1.0}, {"speed": 3.0}, {"speed": 2.0}],
}


def test_medians_and_ratios() -> None:
    assert common.median(FIGURES, "a", "speed") == 6.0
    assert common.ratios(FIGURES, "speed", [("a", "b"), ("a", "c")]) == [
        "a: 3.00 times the speed of b"
    ]


def test_the_best_precision_of_each_is_compared() -> None:
    speeds = {"a, bf16": 4.0, "a, fp32": 6.0, "b, bf16": 3.0, "b, fp32": 2.0, "c, bf16": 1.0}
    speeds |= {"a, nf4": 9.0, "a b, bf16": 9.0}  # no precisions of a
    figures = {name: [{"tokens_per_second": speed}] for name, speed in speeds.items()}
    assert common.best_ratios(figures, [("a", "b"), ("b", "c"), ("a, nf4", "a"), ("a", "d")]) == [
        "a at its best (fp32): 2.00 times the tokens per second of b at its best (bf16)",
        "b at its best (bf16): 3.00 times the tokens per second of c, bf16",
        "a, nf4: 1.50 times the tokens per second of a at its best (fp32)",
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


@pytest.mark.parametrize("script", ["finetune", "busy"])
def test_contenders_with_a_comma_in_their_names(script: str) -> None:
    names = ("lit-llama LoRA, bf16", "peft LoRA, fp32")
    words = [word for name in names for word in ("--contenders", name)]
    given = cli.parse(load_script(f"benchmarks/{script}.py").main, words)["contenders"]
    assert tuple(given) == names


def test_contenders_of_each_kind_of_device(monkeypatch) -> None:
    for script, only_cpu, only_gpu in (
        ("finetune", {"lit-llama LoRA, fp32", "peft LoRA, fp32"}, {"lit-llama LoRA, fp8"}),
        ("generate", {"lit-llama int8 fp32", "litgpt fp32"}, {"lit-llama bf16 compiled"}),
    ):
        module = load_script(f"benchmarks/{script}.py")
        known = {}
        for kind in ("cpu", "cuda"):
            monkeypatch.setattr(module, "default_device", lambda kind=kind: torch.device(kind))
            known[kind] = module.known_contenders()
        assert only_cpu <= known["cpu"].keys() - known["cuda"].keys()
        assert only_gpu <= known["cuda"].keys() - known["cpu"].keys()
        assert known["cpu"].keys() | known["cuda"].keys() == module.CONTENDERS.keys()


def test_the_processor_and_its_features(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(common, "CPU_INFO", file)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert common.cpu_features() == []
    file.write_text(
        "processor\t: 0\nmodel name\t: Fast CPU\n"
        "flags\t\t: fpu avx512_bf16 avx2 avx512f avx512_fp16\nvmx flags\t: amx_int8\n"
    )
    assert common.cpu_features() == ["avx2", "avx512f", "avx512_bf16"]
    common.save("cpu", "", "", "", [], {})
    device = json.loads((tmp_path / "cpu-cpu.json").read_text())["device"]
    assert device.endswith("a shared machine, Fast CPU with avx2, avx512f, avx512_bf16")
    file.write_text("model name: Slow CPU\nflags: fpu\n")
    common.save("cpu", "", "", "", [], {})
    device = json.loads((tmp_path / "cpu-cpu.json").read_text())["device"]
    assert device.endswith("a shared machine, Slow CPU")


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
        ("finetune", "lit-llama LoRA, nf4", ["--steps", "5"]),
        ("finetune", "peft LoRA, bf16", ["--steps", "5"]),
        ("generate", "lit-llama bf16, 8 prompts", ["--new_tokens", "4"]),
        ("generate", "transformers fp32", ["--new_tokens", "4"]),
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


class Matmuls(TorchDispatchMode):
    """Collects the dtypes of the results of matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        matmuls = ("mm", "addmm", "linear", "_linear_pointwise", "linear_dynamic")
        if function.overloadpacket.__name__ in matmuls:
            self.dtypes.add(result.dtype)
        return result


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["lit-llama LoRA", "lit-llama full", "peft LoRA"])
def test_finetuning_computes_in_its_precision(
    name: str, precision: str, tiny_data: Path, tiny_checkpoint: Path
) -> None:
    finetune = load_script("benchmarks/finetune.py")
    with Matmuls() as matmuls:
        finetune.measure(f"{name}, {precision}", tiny_checkpoint, tiny_data, 4, 1)
    assert matmuls.dtypes == {common.PRECISIONS[precision]}


@pytest.mark.parametrize(
    "name", ["transformers bf16", "transformers fp32", "lit-llama fp32", "lit-llama int8 fp32"]
)
def test_decoding_computes_in_its_precision(name: str, tiny_checkpoint: Path) -> None:
    generate = load_script("benchmarks/generate.py")
    with Matmuls() as matmuls:
        generate.measure(name, tiny_checkpoint, 4)
    assert matmuls.dtypes == {common.PRECISIONS["fp32" if "fp32" in name else "bf16"]}


def fake_calls(monkeypatch, speeds: dict[str, float], memory: dict[str, float]) -> list[tuple]:
    """Let workers print these figures at once. Returns the list of their calls."""
    calls = []

    def call(script: str, *flags: object) -> str:
        calls.append((script, *flags))
        if "--worker" not in flags:
            return ""
        name = flags[flags.index("--worker") + 1]
        figures = {"tokens_per_second": speeds[name], "peak_memory_bytes": memory[name]}
        return json.dumps(figures | {"first_token_seconds": 1.0})

    monkeypatch.setattr(common, "call", call)
    return calls


def test_finetuning_beside_peers(
    tiny_checkpoint: Path, records_file: Path, tmp_path: Path, monkeypatch
) -> None:
    finetune = load_script("benchmarks/finetune.py")
    parameters = sum(p.numel() for p in finetune.empty_model(tiny_checkpoint, None).parameters())
    limits = {torch.bfloat16: 4e3 * parameters, torch.float32: 2e3 * parameters}
    monkeypatch.setattr(common, "matmul_flops", limits.get)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    speeds = {"lit-llama LoRA, bf16": 400.0, "lit-llama LoRA, fp32": 100.0}
    speeds |= {"lit-llama LoRA, nf4": 300.0, "peft LoRA, bf16": 50.0, "peft LoRA, fp32": 80.0}
    speeds |= {"lit-llama full, fp32": 100.0}
    memory = dict(zip(speeds, (1e9, 2e9, 5e8, 4e9, 5e9, 3e9), strict=True))
    calls = fake_calls(monkeypatch, speeds, memory)
    finetune.main(tiny_checkpoint, records_file, 2, contenders=tuple(speeds))
    workers = [call[call.index("--worker") + 1] for call in calls if "--worker" in call]
    assert workers == [*speeds, *speeds]
    result = json.loads((tmp_path / "finetune-cpu.json").read_text())
    assert result["table"].splitlines()[2:] == [
        "| lit-llama LoRA, bf16 | 400 | 40% | 1.00 GB |",
        "| lit-llama LoRA, fp32 | 100 | 20% | 2.00 GB |",
        "| lit-llama LoRA, nf4 | 300 | 30% | 0.50 GB |",
        "| peft LoRA, bf16 | 50 | 5% | 4.00 GB |",
        "| peft LoRA, fp32 | 80 | 16% | 5.00 GB |",
        "| lit-llama full, fp32 | 100 | 30% | 3.00 GB |",
    ]
    best = "lit-llama LoRA at its best (bf16): 5.00 times the tokens per second of peft LoRA at its"
    assert result["notes"][:-1] == [
        f"{best} best (fp32)",
        "lit-llama LoRA, nf4: 0.75 times the tokens per second of lit-llama LoRA, bf16",
        "lit-llama LoRA, bf16: 0.25 times the peak memory bytes of peft LoRA, bf16",
        "lit-llama LoRA, fp32: 0.40 times the peak memory bytes of peft LoRA, fp32",
        "lit-llama LoRA, nf4: 0.50 times the peak memory bytes of lit-llama LoRA, bf16",
    ]
    both = [f"{limit / 1e9:,.0f} GFLOP/s in" for limit in limits.values()]
    assert f"{both[0]} bf16, {both[1]} fp32, measured" in result["notes"][-1]


def test_decoding_beside_peers(tiny_checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    speeds = {"transformers bf16": 10.0, "transformers fp32": 20.0, "lit-llama bf16": 40.0}
    speeds |= {"lit-llama fp32": 30.0, "lit-llama int8": 60.0, "lit-llama int8 fp32": 90.0}
    fake_calls(monkeypatch, speeds, dict.fromkeys(speeds, 1e9))
    generate = load_script("benchmarks/generate.py")  # takes `call` from common
    parameters = sum(p.numel() for p in generate.empty_model(tiny_checkpoint, None).parameters())
    monkeypatch.setattr(generate, "bandwidth", lambda: 1000.0 * parameters)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    generate.main(tiny_checkpoint, rounds=1, contenders=tuple(speeds))
    result = json.loads((tmp_path / "generate-cpu.json").read_text())
    shares = [line.split(" | ")[2] for line in result["table"].splitlines()[2:]]
    assert shares == ["2%", "8%", "8%", "12%", "", ""]
    peer = "times the tokens per second of transformers at its best (fp32)"
    assert result["notes"][:-1] == [
        f"lit-llama at its best (bf16): 2.00 {peer}",
        f"lit-llama int8 at its best (fp32): 4.50 {peer}",
        "lit-llama int8: 1.50 times the tokens per second of lit-llama bf16",
        "lit-llama int8 fp32: 3.00 times the tokens per second of lit-llama fp32",
    ]


@pytest.fixture
def processes(monkeypatch) -> Iterator[list[subprocess.Popen]]:
    """All processes that a test starts. They end with it."""
    started = []

    class Spied(subprocess.Popen):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Spied)
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_finetuning_beside_a_busy_process(
    processes, tiny_checkpoint: Path, records_file: Path, tmp_path: Path, monkeypatch
) -> None:
    busy = load_script("benchmarks/busy.py")
    ours, theirs = "lit-llama LoRA, bf16", "peft LoRA, bf16"
    speeds = {ours: (90.0, 60.0), theirs: (30.0, 15.0)}  # beside no process and beside one
    order = []

    def call(script: str, *flags: object) -> str:
        if "--worker" not in flags:
            return ""
        name = flags[flags.index("--worker") + 1]
        beside = sum(process.poll() is None for process in processes)
        order.append((name, beside))
        return json.dumps({"tokens_per_second": speeds[name][beside]})

    monkeypatch.setattr(common, "call", call)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    busy.main(tiny_checkpoint, records_file, rounds=2)
    assert order == [(ours, 0), (ours, 1), (theirs, 0), (theirs, 1)] * 2
    result = json.loads((tmp_path / "busy-cpu.json").read_text())
    assert result["table"].splitlines()[2:] == [
        f"| {ours} | 90 | 60 | 67% |",
        f"| {theirs} | 30 | 15 | 50% |",
    ]
    beside = "beside a busy process"
    assert result["notes"] == [
        f"{ours}, quiet: 3.00 times the tokens per second of {theirs}, quiet",
        f"{ours}, {beside}: 4.00 times the tokens per second of {theirs}, {beside}",
    ]
    with pytest.raises(UserError, match="no 'peft'"):
        busy.main(tiny_checkpoint, records_file, contenders=("peft",))


def test_a_busy_process_ends_with_an_error(processes) -> None:
    busy_process = load_script("benchmarks/busy.py").busy_process()
    busy_process.__enter__()
    assert processes[0].poll() is None
    error = UserError("a contender fails")
    assert not busy_process.__exit__(UserError, error, None)
    assert processes[0].poll() is not None


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
