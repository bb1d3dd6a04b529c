"""Quantized layers against bitsandbytes, torch and plain arithmetic; training and inference."""

import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script, make_hf_model
from torch import nn

from lit_llama import LLaMA, LLaMAConfig, UserError, load_model
from lit_llama.fast import kernels, use_fast_paths
from lit_llama.fast import quantization as quantization_module
from lit_llama.fast.decoding import optimize_for_inference
from lit_llama.fast.quantization import (
    FOR_DECODING,
    FOR_TRAINING,
    FP8Linear,
    Int4Linear,
    Int8Linear,
    NF4Linear,
    VNNILinear,
    quantization,
)
from lit_llama.generation import generate
from lit_llama.lora import LoRAConfig, apply_lora
from lit_llama.runtime.args import RunArgs
from lit_llama.runtime.devices import setup_model
from lit_llama.storage.model_folder import load_weights
from lit_llama.training import TrainArgs
from lit_llama.wrapping import base_linears

# relative error of W: half a step of 1/127 of a row's maximum, of 1/15 of a group's range, of NF4,
# of 3 bits
BOUNDS = {"int8": 0.01, "int4": 0.11, "nf4": 0.10, "fp8": 0.03}
KINDS = FOR_DECODING | FOR_TRAINING


@pytest.fixture(autouse=True)
def fp8_needs_torch_2_13_on_the_cpu(request) -> None:
    lacks_fp8 = not torch.cuda.is_available() and torch.__version__ < (2, 13)
    if "fp8" in request.node.name.lower() and lacks_fp8:
        with pytest.raises(UserError, match=r"on the CPU it needs torch 2\.13"):
            quantization("fp8", FOR_TRAINING)
        pytest.skip("fp8 on the CPU needs torch 2.13")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def test_nf4_equals_that_of_bitsandbytes() -> None:
    weight = normal(64, 256, dtype=torch.float32)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    layer = NF4Linear(weight)
    assert torch.equal(layer.nf4.flatten(), codes.flatten())
    assert torch.equal(layer.dequantize(), bnb.dequantize_4bit(codes, state))


def test_int8_equals_that_of_torch() -> None:
    weight = normal(64, 256, dtype=torch.float32)
    scales, zeros = weight.abs().amax(dim=1) / 127, torch.zeros(64, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -127, 127)
    torch.testing.assert_close(Int8Linear(weight).dequantize(), expected, atol=1e-6, rtol=0)  # fp32


def test_int4_is_at_most_half_a_step_off() -> None:
    weight = normal(32, 256)
    layer = Int4Linear(weight)
    groups = weight.float().unflatten(1, (-1, layer.group))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = layer.dequantize().float().unflatten(1, (-1, layer.group)) - groups
    # scale, zero point and result are rounded to bf16
    assert (error.abs().amax(-1) <= 0.5 * step + 0.02).all()
    assert layer.int4.numel() * layer.int4.element_size() == weight.numel() / 2


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_matmul_is_that_of_the_dequantized_weight(name: str, rows: int) -> None:
    weight, bias, x = normal(48, 128, seed=1), normal(48, seed=2), normal(rows, 128, seed=3)
    layer = KINDS[name](weight, bias)
    assert relative_error(layer.dequantize(), weight) < BOUNDS[name]
    expected = F.linear(x.double(), layer.dequantize().double(), bias.double())
    # bf16 results; fp8 rounds x as well
    assert relative_error(layer(x), expected) < (0.04 if name == "fp8" else 0.01)
    assert layer(x).dtype == torch.bfloat16


# A process of its own, since a kernel that reads beyond a tensor may crash it.
GRID = """
import itertools, sys
import torch
import torch.nn.functional as F
from lit_llama.fast.quantization import FOR_DECODING, FOR_TRAINING

torch.manual_seed(0)
torch.set_num_threads(1)
kind = (FOR_DECODING | FOR_TRAINING)[sys.argv[1]]
dtype, tolerance = getattr(torch, sys.argv[2]), float(sys.argv[3])
inputs = (1, 7, 8, 16, 24, 31, 33, 40, 48, 64, 72, 100, 129, 160, 200, 576)
outputs = (1, 2, 3, 5, 8, 15, 16, 17, 40, 64, 100, 129)
rows = (1, 2, 3, 5, 8, 9, 16, 31, 32)
for size, out, has_bias in itertools.product(inputs, outputs, (False, True)):
    weight = torch.randn(out, size).to(dtype)
    bias = torch.randn(out).to(dtype) if has_bias else None
    layer = kind(weight, bias)
    exact = layer.dequantize().double()
    assert exact.shape == weight.shape
    assert (exact - weight).abs().amax() <= weight.abs().amax() * 0.3
    for count in rows:
        whole = torch.randn(count, size + 8).to(dtype)
        several = torch.randn(2, count, size).to(dtype)
        # a row stride, a storage that is not aligned, three dimensions
        for x in (several[0], whole[:, 8:], whole[:, 1 : size + 1].contiguous(), several):
            plain, no_bias = x.double(), torch.zeros(out)
            shift = (no_bias if bias is None else bias).double()
            with torch.inference_mode():
                y = layer(x)
            assert y.shape == (*x.shape[:-1], out) and y.dtype == dtype
            terms = F.linear(plain.abs(), exact.abs(), shift.abs())
            error = (y - F.linear(plain, exact, shift)).abs()
            assert (error <= tolerance * terms).all(), (size, out, count, has_bias, x.stride())
print("complete")
"""


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.015), ("float32", 1e-5)])
@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_every_shape_computes_with_the_dequantized_weight(
    name: str, dtype: str, tolerance: float
) -> None:
    if name == "int8":
        tolerance = 0.015  # its kernel takes bf16, whatever the model's dtype
    args = [sys.executable, "-c", GRID, name, dtype, str(tolerance)]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "complete\n"), done.stderr[-1000:]


@pytest.mark.skipif(not VNNILinear.pays(torch.ones(2, 1)), reason="needs VNNI and FBGEMM")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(96, 48), (257, 33), (1000, 64)])
def test_vnni_rounds_each_token_by_its_own_size(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias = normal(*shape, seed=1, dtype=dtype), normal(shape[0], seed=2, dtype=dtype)
    layer, plain = VNNILinear(weight, bias), Int8Linear(weight, bias)
    assert relative_error(layer.dequantize(), plain.dequantize()) < 0.005
    x = normal(9, shape[1], seed=3, dtype=dtype)
    x[4] *= 300  # as the first token of a text is in some layers
    expected = F.linear(x.double(), layer.dequantize().double(), bias.double())
    with torch.inference_mode():
        together, alone = layer(x), torch.cat([layer(row) for row in x.split(1)])
    assert together.dtype == alone.dtype == dtype
    for row in range(9):
        assert relative_error(together[row], expected[row]) < 0.02
        assert relative_error(alone[row], expected[row]) < 0.02
    assert layer(x[None]).shape == (1, 9, shape[0])


@pytest.mark.skipif(not VNNILinear.pays(torch.ones(2, 1)), reason="needs VNNI and FBGEMM")
def test_int8_decoding_takes_vnni_where_it_is_faster() -> None:
    model = LLaMA(LLaMAConfig.from_name("SmolLM2-135M"))
    model.layers = model.layers[:1]
    optimize_for_inference(model.bfloat16(), torch.device("cpu"), "int8")
    layer = model.layers[0]
    kinds = [type(x) for x in (layer.mlp.gate_up_proj, model.lm_head, layer.mlp.down_proj)]
    assert kinds == [VNNILinear, VNNILinear, Int8Linear]


@pytest.mark.parametrize(("name", "bytes_each"), [("int8", 1), ("int4", 0.5), ("nf4", 0.5)])
def test_odd_shapes_take_no_more_memory(name: str, bytes_each: float) -> None:
    layer = KINDS[name](normal(1001, 2001))
    size = max(buffer.nbytes for buffer in layer.buffers())
    assert size == pytest.approx(1001 * 2001 * bytes_each, rel=0.03)


@pytest.mark.parametrize("name", FOR_DECODING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fast_paths", [False, True], ids=["plain", "fused"])
def test_a_model_of_odd_shapes_answers(
    tmp_path: Path, name: str, dtype: torch.dtype, fast_paths: bool
) -> None:
    sizes = dict(hidden_size=40, intermediate_size=72, num_attention_heads=5, vocab_size=301)
    make_hf_model(**sizes, num_key_value_heads=1, initializer_range=0.05).save_pretrained(tmp_path)
    plain, quantized = (load_model(tmp_path, dtype=dtype) for _ in range(2))
    optimize_for_inference(quantized, torch.device("cpu"), name, fast_paths)
    ids = torch.arange(3, 43)[None]
    with torch.inference_mode():
        assert relative_error(quantized(ids), plain(ids)) < (0.05 if name == "int8" else 0.3)
    assert len(generate(quantized, ids[0], 5, temperature=0)) == 45


@pytest.mark.parametrize("kind", [NF4Linear, FP8Linear])
def test_gradient_is_that_of_the_dequantized_weight(kind) -> None:
    layer, grad = kind(normal(48, 128, seed=1)), normal(9, 48, seed=3)
    x = normal(9, 128, seed=2).requires_grad_()
    (actual,) = torch.autograd.grad(layer(x), x, grad)
    expected = grad.double() @ layer.dequantize().double()
    assert relative_error(actual, expected) < (0.04 if kind is FP8Linear else 0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers wide enough for every quantization."""
    path = tmp_path_factory.mktemp("model")
    sizes = dict(hidden_size=128, intermediate_size=256, num_key_value_heads=2)
    make_hf_model(**sizes, attention_bias=True, initializer_range=0.05).save_pretrained(path)
    return path


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.03), ("int4", 0.25)])
def test_logits_of_a_quantized_model_stay_near(folder: Path, name: str, bound: float) -> None:
    input_ids = torch.arange(3, 43)[None]
    plain, quantized = (load_model(folder) for _ in range(2))
    optimize_for_inference(quantized, torch.device("cpu"), name)
    assert relative_error(quantized(input_ids), plain(input_ids)) < bound
    assert len(generate(quantized, input_ids[0], 5, temperature=0)) == 45


@pytest.mark.parametrize("name", FOR_TRAINING)
def test_only_frozen_layers_are_quantized_for_training(folder: Path, name: str) -> None:
    model = load_model(folder)
    apply_lora(model, LoRAConfig(targets=("q_proj",), use_dora=True))
    load_weights(model, folder, quantize=name)
    layer = model.layers[1]
    assert type(layer.self_attn.q_proj.base) is type(layer.mlp.up_proj) is FOR_TRAINING[name]
    assert type(model.lm_head) is nn.Linear
    norms = torch.linalg.vector_norm(layer.self_attn.q_proj.base.dequantize().float(), dim=1)
    torch.testing.assert_close(layer.self_attn.q_proj.lora_magnitude_vector, norms)
    batch = dict(label_positions=torch.arange(9), labels=torch.arange(4, 13))
    loss = model(torch.arange(3, 13), **batch)
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    expected = load_model(folder)(torch.arange(3, 13), **batch)
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("name", FOR_TRAINING)
def test_lora_on_a_quantized_base_learns_and_answers(
    tmp_path: Path, folder: Path, tiny_checkpoint: Path, records_file: Path, name: str, capsys
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for file in [*folder.iterdir(), *tiny_checkpoint.glob("tokenizer*")]:
        (checkpoint / file.name).symlink_to(file)
    prepare = load_script("scripts/prepare_json.py").main
    prepare(records_file, checkpoint, tmp_path / "data", val_size=10)
    run = RunArgs(tmp_path / "out", checkpoint, tmp_path / "data", quantize=name)
    train = TrainArgs(max_steps=12, batch_size=16, learning_rate=1e-2)
    load_script("finetune/lora.py").main(run, train=train)
    losses = capsys.readouterr().out.split("done: val loss ")[1].split(",")[0].split(" -> ")
    assert float(losses[1]) < float(losses[0]) - 0.3
    script = load_script("generate/lora.py")
    args = script.AnswerArgs("Hi", max_new_tokens=5, quantize="int8")
    script.main(args, [tmp_path / "out"])
    assert "tokens/sec" in capsys.readouterr().err


def test_nf4_is_unpacked_by_bitsandbytes_as_by_our_kernel(monkeypatch) -> None:
    layer = NF4Linear(normal(48, 200))
    theirs = layer.dequantize_by_bitsandbytes().view(48, -1)[:, :200]
    # they multiply in fp32 what is rounded to bf16 here
    torch.testing.assert_close(theirs, layer.dequantize(), rtol=1e-2, atol=0)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)  # cannot be imported
    monkeypatch.setattr(quantization_module, "BITSANDBYTES", True)
    assert layer.dequantize_by_bitsandbytes() is None
    assert not quantization_module.BITSANDBYTES


def test_fp8_quantizes_the_input_of_several_projections_once(monkeypatch) -> None:
    calls = []
    to_fp8 = kernels.to_fp8
    layers = [FP8Linear(normal(64, 32, seed=seed)) for seed in range(3)]
    x = normal(20, 32, seed=5)
    monkeypatch.setattr(kernels, "to_fp8", lambda x, *more: calls.append(x) or to_fp8(x, *more))
    first = [layer(x) for layer in layers]
    assert len(calls) == 1
    x.mul_(2)  # another input in the same tensor
    for layer, before in zip(layers, first, strict=True):
        assert torch.equal(layer(x), 2 * before)
    assert len(calls) == 2


@pytest.mark.parametrize("name", FOR_DECODING)
def test_the_head_is_int8_on_the_cpu(tmp_path: Path, name: str) -> None:
    """Tied or not: its size counts most where the model is small."""
    has_vnni = VNNILinear.pays(torch.ones(2, 1))
    for tied in (True, False):
        make_hf_model(tie_word_embeddings=tied).save_pretrained(tmp_path / str(tied))
        model = load_model(tmp_path / str(tied))
        optimize_for_inference(model, torch.device("cpu"), name)
        assert type(model.lm_head) is (VNNILinear if has_vnni else Int8Linear)


def test_int4_on_a_gpu_is_for_bf16() -> None:
    class OnGPU(torch.Tensor):
        is_cuda = True

    weight = normal(32, 128, dtype=torch.float32).as_subclass(OnGPU)
    with pytest.raises(UserError, match="--quantize int4: on a GPU with --precision bf16-true"):
        Int4Linear(weight)


def test_unsupported_quantization_is_refused(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    run = RunArgs(tmp_path / "out", tiny_checkpoint, tiny_data, quantize="nf4")
    with pytest.raises(UserError, match="int5: unknown"):
        quantization("int5", FOR_TRAINING)
    with pytest.raises(UserError, match="works on one device"):
        setup_model(Mock(world_size=2), load_model(tiny_checkpoint), tiny_checkpoint, "nf4")
    with pytest.raises(UserError, match="all of them train"):
        load_script("finetune/full.py").main(run)
    base = load_script("generate/base.py")
    with pytest.raises(UserError, match="Known: int8, int4"):
        base.main(base.AnswerArgs("Hi", quantize="nf4"), tiny_checkpoint)


@pytest.mark.parametrize("name", FOR_TRAINING)
def test_a_lora_on_quantized_weights_trains_on_the_fast_paths(name: str) -> None:
    config = LLaMAConfig(97, 64, 128, 2, 4, 2, head_dim=16)
    model = LLaMA(config).bfloat16().requires_grad_(False)
    apply_lora(model, LoRAConfig(r=4, targets=("all-linear",), dropout=0))
    for layer, linear in base_linears(model).items():
        if layer != "lm_head":
            model.set_submodule(layer, FOR_TRAINING[name](linear.weight.detach()))
    use_fast_paths(model)
    ids = torch.arange(30)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, [12, 18], torch.arange(29), ids[1:])
    loss.backward()
    assert model.layers[0].self_attn.q_proj.lora_B.weight.grad.norm() > 0
