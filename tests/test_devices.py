"""Checks at the start of a run on a GPU: run on the CPU, with the answers of a GPU's torch.cuda."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import load_script

from lit_llama import LLaMA, LLaMAConfig
from lit_llama.args import AdapterConfig, LoRAConfig
from lit_llama.errors import UsageError, UserError
from lit_llama.fast import kernels, optimize_for_training
from lit_llama.fast.decoding import optimize_for_inference
from lit_llama.runtime import devices, memory
from lit_llama.runtime.args import RunArgs, TrainArgs
from lit_llama.runtime.memory import estimate_memory, memory_advice, quick_estimate
from lit_llama.storage.methods import METHODS, FullConfig

GPU = torch.device("cuda")
SETTINGS = {
    "LORA": LoRAConfig(),
    "llama_adapter": AdapterConfig(),
    "llama_adapter_v2": AdapterConfig(),
    "full": FullConfig("bf16-mixed"),
}


def model_of(name: str = "7B", method: str = "LORA") -> LLaMA:
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig.from_name(name)).bfloat16().requires_grad_(False)
    METHODS[method].apply(model, SETTINGS[method])
    optimize_for_training(model, GPU)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_few_layers_are_enough_for_the_estimate(method: str) -> None:
    model = model_of("SmolLM2-135M", method)
    estimated = sum(estimate_memory(model, [600], "bf16-mixed").values())
    quick = quick_estimate(model, 600, "bf16-mixed", None, 1, None)
    assert quick == pytest.approx(estimated, rel=0.02)  # the first layers have no adapter
    assert model.embed_tokens.weight.is_meta  # left as it was
    assert len(model.layers) == 30


@pytest.fixture(scope="module")
def advice() -> Iterator[Callable]:
    """Advice for a LoRA of a 7B; what is estimated once is remembered."""
    model, estimates = model_of(), {}

    def remembered(other: LLaMA, *settings: object) -> float:
        if settings not in estimates:
            estimates[settings] = quick_estimate(other, *settings)
        return estimates[settings]

    def ask(free_gb: float, longest: int = 512, **flags: object) -> str:
        run = RunArgs(Path("out"), precision="bf16-mixed", quantize=flags.pop("quantize", None))
        return memory_advice(model, longest, run, TrainArgs(**flags), 1, free_gb * 1e9) or ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "quick_estimate", remembered)
        yield ask


def test_a_run_that_does_not_fit_is_told_what_makes_it_fit(advice: Callable) -> None:
    assert advice(20) == ""
    problem = "this run takes 16.0 GB of GPU memory, and 15.4 GB are free."
    assert advice(15.4) == f"{problem} With --train.recompute block it takes 14.5 GB"
    with_less = advice(14.9)
    assert "With --train.recompute block --train.micro_batch_tokens 1024 it takes 14.0" in with_less
    assert "With --quantize nf4 it takes 6.5 GB" in advice(12)
    assert "With --quantize nf4" in advice(15, longest=2000)  # no sample is split
    assert advice(4).endswith("Use more GPUs (--devices), shorter samples or a smaller model")
    assert "this run takes 20.4 GB" in advice(18, recompute="none")
    assert "With --train.recompute activations it takes 16.0 GB" in advice(18, recompute="none")
    assert "nf4" not in advice(12, quantize="nf4")
    assert "--devices" not in advice(3, quantize="nf4")


def test_a_run_with_much_free_memory_is_told_what_makes_it_faster(advice: Callable) -> None:
    hint = "--train.recompute none would be faster, and take 20.4 of 80.0 GB of GPU memory"
    assert advice(80) == hint
    assert advice(80, recompute="activations") == ""  # was chosen


def test_memory_is_compared_on_a_gpu_only(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(4e9), int(24e9)))
    dataset, run = Mock(), RunArgs(Path("out"), precision="bf16-mixed")
    dataset.train.lengths = [20, 300]
    monkeypatch.setattr(memory, "quick_estimate", lambda *settings: 16e9)
    for device, rank in (("cuda", 0), ("cuda", 1), ("cpu", 0)):
        fabric = Mock(device=torch.device(device), is_global_zero=rank == 0, world_size=1)
        devices.check_memory(fabric, model_of("SmolLM2-135M"), dataset, run, TrainArgs())
        printed = capsys.readouterr().err
        assert printed.startswith("this run takes 16.0 GB") == (device == "cuda" and rank == 0)


def test_a_gpu_without_bf16(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    # emulation would count as support
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: emulated)
    with pytest.raises(UsageError, match=r"--precision bf16-mixed: Tesla T4 has no bf16.*32-true"):
        devices.check_gpu("bf16-mixed")
    devices.check_gpu("32-true")


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_gpus_that_are_left_idle(quantize: str | None, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(24e9), int(24e9)))
    monkeypatch.setattr(memory, "memory_advice", lambda *args: None)
    run = RunArgs(Path("out"), precision="bf16-mixed", quantize=quantize)
    dataset = Mock()
    dataset.train.lengths = [20]
    for world_size in (4, 1):
        fabric = Mock(device=GPU, is_global_zero=True, world_size=world_size)
        devices.check_memory(fabric, model_of("SmolLM2-135M"), dataset, run, TrainArgs())
    line = "1 of 4 GPUs is used. For all of them: --devices 4\n"
    assert capsys.readouterr().err == ("" if quantize else line)  # NF4 is for one device


def test_cudnn_attention_is_off_on_a_gpu(monkeypatch) -> None:
    enabled = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", enabled.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.default_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.default_device() == GPU
    assert enabled == [False]


def test_compiled_decoding_on_a_gpu_needs_a_c_compiler(monkeypatch) -> None:
    answering = load_script("generate/answering.py")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "c_compiler", lambda: None)
    assert answering.load_device(answering.AnswerArgs()) == GPU
    with pytest.raises(UserError, match="--compile: needs a C compiler on a GPU"):
        answering.load_device(answering.AnswerArgs(compile=True))
    monkeypatch.setattr(kernels, "c_compiler", lambda: "/usr/bin/gcc")
    assert answering.load_device(answering.AnswerArgs(compile=True)) == GPU


def test_inference_in_bf16_needs_a_gpu_that_has_it(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: emulated)
    with pytest.raises(UserError, match="--precision bf16-true: Tesla T4 has no bf16"):
        optimize_for_inference(model_of("SmolLM2-135M"), GPU)


def test_expandable_segments_are_the_default() -> None:
    """Read by torch at the first use of a GPU; what a user has set stays."""
    code = "import os, lit_llama.runtime.cli; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    for given, expected in (
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, "max_split_size_mb:128"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, "None"),
    ):
        environment = {name: value for name, value in os.environ.items() if "PYTORCH" not in name}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment | given, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


def test_what_methods_add_is_on_the_device_before_fabric_looks(monkeypatch) -> None:
    """Else Fabric warns of parameters on different devices."""
    model, fabric = model_of("SmolLM2-135M"), Mock(world_size=1, device=torch.device("meta"))
    monkeypatch.setattr(devices, "load_weights", lambda *args: None)
    devices.setup_model(fabric, model, Path("model"))
    assert {parameter.device for parameter in model.parameters()} == {fabric.device}
    fabric.setup_module.assert_called_once_with(model, move_to_device=False)
