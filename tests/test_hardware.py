"""What is chosen for the machine: precision, kernels, threads. The timings themselves are faked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, load_script, measure_linears, measure_short_attention

from lit_llama import LLaMAConfig, load_model
from lit_llama.args import LoRAConfig
from lit_llama.errors import UsageError
from lit_llama.fast import optimize_for_training
from lit_llama.fast.packing import FrozenPackedLinear, PackedLinear, can_pack
from lit_llama.lora import apply_lora
from lit_llama.runtime import environment, hardware
from lit_llama.runtime.args import RunArgs, TrainArgs
from lit_llama.runtime.hardware import choose_for_training, inference_dtype

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")


def fake(monkeypatch, bf16: float, fp32: float, packed: float = 1.0, attends: bool = True) -> None:
    """Let the CPU take so many seconds; packed weights so many times as long as plain ones."""
    seconds = {(BF16, False): bf16, (BF16, True): bf16 * packed}
    seconds |= {(FP32, False): fp32, (FP32, True): fp32 * packed}
    monkeypatch.setattr(hardware, "time_linears", lambda *args, **kwargs: seconds)
    monkeypatch.setattr(hardware, "short_attention_pays", lambda *args: attends)


def choose(folder: Path, trains_all: bool = False, **given: object) -> tuple[str, list[str] | None]:
    args, train = RunArgs(Path("out"), folder), TrainArgs()
    for name, value in given.items():
        setattr(train if hasattr(train, name) else args, name, value)
    args, train = choose_for_training(args, train, trains_all)
    return args.precision, train.kernels


def test_training_takes_the_precision_that_is_faster_here(
    tiny_checkpoint: Path, monkeypatch, capsys
) -> None:
    fake(monkeypatch, bf16=1, fp32=2)
    assert choose(tiny_checkpoint)[0] == "bf16-mixed"
    line = "precision bf16-mixed: 2.0 times as fast as 32-true on this CPU\n"
    assert capsys.readouterr().err == line
    fake(monkeypatch, bf16=1.8, fp32=1)
    assert choose(tiny_checkpoint)[0] == "32-true"
    line = "precision 32-true: 1.8 times as fast as bf16-mixed on this CPU\n"
    assert capsys.readouterr().err == line
    fake(monkeypatch, bf16=1.05, fp32=1)  # not worth twice the memory
    assert choose(tiny_checkpoint)[0] == "bf16-mixed"
    assert choose(tiny_checkpoint, precision="32-true")[0] == "32-true"


def test_fp32_has_to_fit_into_half_of_the_memory(
    tiny_checkpoint: Path, monkeypatch, capsys
) -> None:
    fake(monkeypatch, bf16=3, fp32=1, packed=0.5)
    parameters = (tiny_checkpoint / "model.safetensors").stat().st_size / 2
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 8.1 * parameters)
    assert choose(tiny_checkpoint)[0] == "32-true"
    # full finetuning takes 16 bytes for each parameter, packed fp32 weights take eight
    assert choose(tiny_checkpoint, trains_all=True)[0] == "bf16-mixed"
    assert "32-true is 3.0 times as fast, but memory is too short" in capsys.readouterr().err
    assert choose(tiny_checkpoint)[1] == ["short_attention"]
    assert choose(tiny_checkpoint, precision="bf16-mixed")[1] == ["packed", "short_attention"]


def test_the_kernels_that_pay_are_used(tiny_checkpoint: Path, monkeypatch) -> None:
    fake(monkeypatch, bf16=1, fp32=2, packed=0.8, attends=False)
    assert choose(tiny_checkpoint)[1] == ["packed"]
    assert choose(tiny_checkpoint, trains_all=True)[1] == []
    assert choose(tiny_checkpoint, fast_paths=False)[1] == []  # which they are part of
    fake(monkeypatch, bf16=1, fp32=2, packed=0.95)
    assert choose(tiny_checkpoint)[1] == ["short_attention"]
    assert choose(tiny_checkpoint, kernels=[])[1] == []


def test_elsewhere_than_on_one_cpu_nothing_is_measured(tiny_checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr(hardware, "time_linears", None)
    assert choose(tiny_checkpoint, devices=2) == ("bf16-mixed", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose(tiny_checkpoint) == ("bf16-mixed", None)
    assert inference_dtype("auto", tiny_checkpoint) == BF16


def test_decoding_takes_the_precision_that_is_faster_here(
    tiny_checkpoint: Path, monkeypatch
) -> None:
    fake(monkeypatch, bf16=1, fp32=2)
    assert inference_dtype("auto", tiny_checkpoint) == BF16
    assert inference_dtype("32-true", tiny_checkpoint) == FP32
    fake(monkeypatch, bf16=2, fp32=1)
    assert inference_dtype("auto", tiny_checkpoint) == FP32
    with pytest.raises(UsageError, match="--precision fp16: unknown"):
        inference_dtype("fp16")


def test_a_run_that_resumes_keeps_its_choice(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, monkeypatch
) -> None:
    main, out = load_script("finetune/lora.py").main, tmp_path / "out"

    def run(steps: int, **more: object) -> dict:
        args = RunArgs(out, tiny_checkpoint, tiny_data, **more)
        main(args, train=TrainArgs(batch_size=8, max_steps=steps))
        return yaml.safe_load((out / "config.yaml").read_text())

    fake(monkeypatch, bf16=2, fp32=1, packed=0.5, attends=False)
    flags = run(2)
    assert (flags["precision"], flags["train"]["kernels"]) == ("32-true", ["packed"])
    fake(monkeypatch, bf16=1, fp32=2)
    flags = run(4, resume=True)
    assert (flags["precision"], flags["train"]["kernels"]) == ("32-true", ["packed"])


@pytest.mark.parametrize("tokens", [1, 256])
def test_every_alternative_is_timed(tiny_checkpoint: Path, tokens: int) -> None:
    threads = torch.get_num_threads()
    config = LLaMAConfig.from_checkpoint(tiny_checkpoint)
    seconds = measure_linears(config, tokens, train=tokens > 1)
    packed = {(dtype, True) for dtype in (BF16, FP32) if can_pack(dtype)}
    assert seconds.keys() == {(BF16, False), (FP32, False)} | packed
    assert min(seconds.values()) > 0
    assert measure_short_attention(config, FP32) in (True, False)
    assert torch.get_num_threads() == threads  # it was one in between


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    ("inputs", "outputs", "tokens"), [(33, 17, 1), (64, 96, 7), (128, 40, 300)]
)
def test_packed_layers_compute_what_plain_ones_do(
    dtype: torch.dtype, inputs: int, outputs: int, tokens: int
) -> None:
    if not can_pack(dtype):
        pytest.skip("oneDNN has no such kernels here")
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    x, grad = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
    tolerance = dict(atol=0.25, rtol=0.02) if dtype == BF16 else dict(atol=1e-4, rtol=1e-4)
    exact = [x.float().requires_grad_(), weight.float(), bias.float()]
    expected = F.linear(*exact)
    (expected_grad,) = torch.autograd.grad(expected, exact[0], grad.float())
    layer = FrozenPackedLinear(weight, bias)
    actual = layer(x.requires_grad_())
    (actual_grad,) = torch.autograd.grad(actual, x, grad)
    torch.testing.assert_close(actual.float(), expected, **tolerance)
    torch.testing.assert_close(actual_grad.float(), expected_grad, **tolerance)
    torch.testing.assert_close(layer.weight, weight)
    with torch.inference_mode():
        once = PackedLinear(weight, bias)(x.detach())
        torch.testing.assert_close(once.float(), expected, **tolerance)
        # a row stride, an offset, and the three dimensions of an adapter's prompt
        whole = F.pad(x.detach(), (3, 5))[:, 3:-5]
        torch.testing.assert_close(layer(whole).float(), expected, **tolerance)
        torch.testing.assert_close(layer(whole[None]).float(), expected[None], **tolerance)


def test_dora_keeps_plain_weights(tiny_checkpoint: Path) -> None:
    """It reads them at each step."""
    for use_dora in (False, True):
        model = load_model(tiny_checkpoint)
        apply_lora(model, LoRAConfig(use_dora=use_dora))
        optimize_for_training(model, CPU, kernels=["packed"])
        assert model.packs_weights == (can_pack(BF16) and not use_dora)


@pytest.mark.parametrize(
    ("text", "cores"),
    [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", None)],
)
def test_cores_of_a_container(text: str, cores: int | None, monkeypatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *args: text)
    assert environment.cpu_limit() == cores


def test_threads_sleep_on_a_crowded_machine_only(monkeypatch) -> None:
    monkeypatch.setattr(environment, "START", (0.0, 100.0, 0.0))
    monkeypatch.setattr(environment.time, "perf_counter", lambda: 2.0)
    monkeypatch.setattr(environment.time, "process_time", lambda: 1.5)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    # in two seconds: 1.5 of our own, and 0.2 of others
    monkeypatch.setattr(environment, "busy_seconds", lambda: 101.7)
    environment.set_wait_policy()
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.setattr(environment, "busy_seconds", lambda: 103.5)  # another process on one core
    environment.set_wait_policy()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # what a user has set stays
    environment.set_wait_policy()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)  # there are cores for both
    assert not environment.is_crowded()


def test_the_system_tells_how_busy_it_is() -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("Linux only")
    before = environment.busy_seconds()
    sum(range(5_000_000))
    assert environment.busy_seconds() > before


def test_answering_imports_no_training_libraries(tiny_checkpoint: Path) -> None:
    """They would take two of the three seconds until the first token."""
    code = """if True:
        import runpy, sys
        sys.path.insert(0, "generate")
        sys.argv = ["generate/base.py", "--checkpoint_dir", sys.argv[1], "--prompt", "the"]
        sys.argv += ["--max_new_tokens", "2", "--template", "none"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        print(sorted({"lightning", "torch._dynamo", "torch.distributed.fsdp"} & set(sys.modules)))
    """
    command = [sys.executable, "-c", code, str(tiny_checkpoint)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("\n[]\n"), done.stdout + done.stderr
