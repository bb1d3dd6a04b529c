"""Each fast path against the plain expression that it equals: values, gradients, and a whole run."""

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from torch import Tensor

from lit_llama import fast, load_model
from lit_llama.adapter import AdapterConfig
from lit_llama.dropout import token_dropout, token_mask, token_rows
from lit_llama.fast import (
    AddLowRank,
    LikeSamples,
    LinearCrossEntropySum,
    RMSNormKeepingInput,
    Rotate,
    ShortAttention,
    SwiGLU,
)
from lit_llama.model import rotate
from lit_llama.training import TrainArgs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored(monkeypatch) -> None:
    monkeypatch.setattr(fast, "enabled", True)


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).requires_grad_(True)


def assert_same(fast_value: Tensor, plain_value: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(fast_value, plain_value, atol=1e-5, rtol=1e-5)  # fp32
    weights = random(*plain_value.shape, seed=9).detach()
    ours = torch.autograd.grad((fast_value * weights).sum(), inputs)
    theirs = torch.autograd.grad((plain_value * weights).sum(), inputs)
    for one, two in zip(ours, theirs, strict=True):
        assert two.norm() > 0
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [7, 20, 64])
@pytest.mark.parametrize("trains_head", [False, True])
def test_cross_entropy(chunk: int, trains_head: bool) -> None:
    hidden, weight = random(20, 8, seed=1), random(50, 8, seed=2).detach().requires_grad_(trains_head)
    labels = torch.randint(50, (20,), generator=torch.Generator().manual_seed(3))
    ours = LinearCrossEntropySum.apply(hidden, weight, labels, chunk)
    plain = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
    assert_same(ours, plain, [hidden, weight] if trains_head else [hidden])
    none = LinearCrossEntropySum.apply(hidden[:0], weight, labels[:0], chunk)
    assert float(none) == 0.0
    assert not torch.autograd.grad(none, hidden)[0].any()


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("lengths", [[1], [5, 33, 2, 64], [300, 70, 40, 290], [257]], ids=str)
def test_attention(kv_heads: int, lengths: list[int]) -> None:
    """Several samples of like lengths; longer and shorter than what keeps its probabilities."""
    tokens = sum(lengths)
    query, key, value = (random(tokens, heads, 8, seed=heads) for heads in (6, kv_heads, kv_heads))
    ours = ShortAttention.apply(query, key, value, LikeSamples(lengths))
    parts = zip(*(t.transpose(0, 1)[None].split(lengths, dim=2) for t in (query, key, value)), strict=True)
    plain = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)[0] for part in parts]
    plain = torch.cat(plain, dim=1).transpose(0, 1)
    # one token attends to itself alone: query and key make no difference
    assert_same(ours, plain, [query, key, value] if tokens > 1 else [value])


@pytest.mark.parametrize("trains_weight", [False, True])
def test_norm(trains_weight: bool) -> None:
    x, weight = random(12, 8, seed=1, scale=0.1), random(8, seed=2).detach().requires_grad_(trains_weight)
    inputs = [x, weight] if trains_weight else [x]
    assert_same(RMSNormKeepingInput.apply(x, weight, 1e-2), F.rms_norm(x, (8,), weight, 1e-2), inputs)


def test_swiglu() -> None:
    gate, up = random(12, 8, seed=1), random(12, 8, seed=2)
    assert_same(SwiGLU.apply(gate, up), F.silu(gate) * up, [gate, up])


def test_rotation() -> None:
    """As complex numbers of the two halves."""
    x, angles = random(12, 3, 8, seed=1), random(12, 1, 4, seed=2).detach()
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    assert_same(Rotate.apply(x, cos, sin, rotate), torch.cat((turned.real, turned.imag), -1), [x])


@pytest.mark.parametrize("drops", [False, True])
def test_low_rank(drops: bool) -> None:
    x, w, a, b = random(12, 8, seed=1), random(10, 8, seed=2), random(3, 8, seed=3), random(10, 3, seed=4)
    with token_rows(0, 0, [5, 6], [7, 5], CPU):
        mask = token_mask(0.4, "layer", x) if drops else None
        ours = AddLowRank.apply(F.linear(x, w), x, a, b, 1.5 / 0.6 if drops else 1.5, mask)
        dropped = token_dropout(x, 0.4, "layer") if drops else x
        plain = F.linear(x, w) + 1.5 * dropped @ a.T @ b.T
        if drops:
            assert (dropped == 0).any()
        assert_same(ours, plain, [x, w, a, b])


@pytest.mark.parametrize("script", ["lora", "adapter_v2", "full"])
def test_a_run_has_the_same_losses_on_fast_and_plain_paths(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, script: str
) -> None:
    curves = []
    for fast_paths in (True, False):
        recipe = dict(batch_size=16, max_steps=10, learning_rate=1e-2, warmup_steps=0, fast_paths=fast_paths)
        out = tmp_path / str(fast_paths)
        flags = dict(checkpoint_dir=tiny_checkpoint, data_dir=tiny_data, precision="32-true")
        flags |= {"adapter": AdapterConfig(start_layer=0)} if script == "adapter_v2" else {}
        load_script(f"finetune/{script}.py").main(out, train=TrainArgs(**recipe), **flags)
        with (out / "metrics.csv").open(newline="") as file:
            curves.append([float(row["loss"]) for row in csv.DictReader(file)])
        assert fast.enabled is fast_paths
    assert curves[0][-1] < curves[0][0] - 0.3
    torch.testing.assert_close(curves[0], curves[1], atol=1e-4, rtol=0)  # fp32
    assert curves[0] != curves[1]  # else the flag did nothing


def test_a_head_that_a_method_has_wrapped_goes_the_plain_way(tiny_checkpoint: Path) -> None:
    """What wraps the head is part of the loss."""

    class Doubled(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base(x)

    model = load_model(tiny_checkpoint, dtype=torch.float32)
    ids = torch.arange(20)
    expected = F.cross_entropy(2 * model(ids)[:-1], ids[1:], reduction="sum")
    model.lm_head = Doubled(model.lm_head)
    actual = model(ids, positions=torch.arange(19), labels=ids[1:])
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-5)
