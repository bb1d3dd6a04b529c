"""Fast modules and functions against the plain expressions: values, gradients, and whole runs."""

import csv
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from test_adapter import METHODS, randomized
from torch import Tensor

from lit_llama import load_model
from lit_llama.adapter import AdapterConfig
from lit_llama.dropout import token_dropout, token_mask, token_rows
from lit_llama.fast import optimize_for_training, use_fast_paths
from lit_llama.fast.functions import (
    CrossEntropyFunction,
    LoRAFunction,
    RMSNormFunction,
    RoPEFunction,
    SwiGLUFunction,
)
from lit_llama.fast.short_attention import LengthBuckets, ShortAttentionFunction
from lit_llama.runtime.args import RunArgs
from lit_llama.runtime.memory import Counter
from lit_llama.training import TrainArgs

CPU = torch.device("cpu")


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.requires_grad_(True)


def frozen(*shape: int, seed: int) -> Tensor:
    return random(*shape, seed=seed).detach()


def assert_same(fast: Tensor, plain: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)  # fp32
    weights = frozen(*plain.shape, seed=9)
    ours = torch.autograd.grad((fast * weights).sum(), inputs)
    theirs = torch.autograd.grad((plain * weights).sum(), inputs)
    for one, two in zip(ours, theirs, strict=True):
        assert two.norm() > 0
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [7, 20, 64])
@pytest.mark.parametrize("trains_head", [False, True])
def test_cross_entropy(chunk: int, trains_head: bool) -> None:
    hidden, weight = random(20, 8, seed=1), frozen(50, 8, seed=2).requires_grad_(trains_head)
    labels = torch.randint(50, (20,), generator=torch.Generator().manual_seed(3))
    fast = CrossEntropyFunction.apply(hidden, weight, labels, chunk, 3)
    plain = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
    assert_same(fast, plain, [hidden, weight] if trains_head else [hidden])
    empty = CrossEntropyFunction.apply(hidden[:0], weight, labels[:0], chunk, 3)
    assert float(empty) == 0.0
    assert not torch.autograd.grad(empty, hidden)[0].any()


def test_loss_of_a_label_whose_probability_rounds_to_zero() -> None:
    hidden, weight = frozen(4, 8, seed=1), frozen(11, 8, seed=2)
    logits = F.linear(hidden, weight * 100)
    labels = logits.argmin(-1)
    assert not logits.softmax(-1).gather(1, labels[:, None]).any()
    fast = CrossEntropyFunction.apply(hidden, weight * 100, labels, 4, 3)
    torch.testing.assert_close(fast, F.cross_entropy(logits, labels, reduction="sum"))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("lengths", [[1], [5, 33, 2, 64], [300, 70, 40, 290], [257]], ids=str)
def test_short_attention(kv_heads: int, lengths: list[int]) -> None:
    """Samples of similar lengths; longer and shorter than those whose probabilities are saved."""
    tokens = sum(lengths)
    query, key, value = (random(tokens, h, 8, seed=h) for h in (6, kv_heads, kv_heads))
    fast = ShortAttentionFunction.apply(query, key, value, LengthBuckets(lengths))
    samples = (t.transpose(0, 1)[None].split(lengths, dim=2) for t in (query, key, value))
    options = dict(is_causal=True, enable_gqa=True)
    plain = [F.scaled_dot_product_attention(*qkv, **options)[0] for qkv in zip(*samples)]  # noqa: B905
    plain = torch.cat(plain, dim=1).transpose(0, 1)
    # A single token attends to itself alone: query and key make no difference.
    assert_same(fast, plain, [query, key, value] if tokens > 1 else [value])


@pytest.mark.parametrize("trains_weight", [False, True])
def test_rms_norm(trains_weight: bool) -> None:
    x, weight = random(12, 8, seed=1, scale=0.1), frozen(8, seed=2).requires_grad_(trains_weight)
    inputs = [x, weight] if trains_weight else [x]
    assert_same(RMSNormFunction.apply(x, weight, 1e-2), F.rms_norm(x, (8,), weight, 1e-2), inputs)


def test_swiglu() -> None:
    gate, up = random(12, 8, seed=1), random(12, 8, seed=2)
    assert_same(SwiGLUFunction.apply(gate, up), F.silu(gate) * up, [gate, up])


def test_rope() -> None:
    """Against complex numbers of the two halves."""
    x, angles = random(12, 3, 8, seed=1), frozen(12, 1, 4, seed=2)
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)
    rotated = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    plain = torch.cat((rotated.real, rotated.imag), -1)
    assert_same(RoPEFunction.apply(x, cos, sin), plain, [x])


@pytest.mark.parametrize("drops", [False, True])
def test_lora(drops: bool) -> None:
    x, w = random(12, 8, seed=1), random(10, 8, seed=2)
    a, b = random(3, 8, seed=3), random(10, 3, seed=4)
    with token_rows(0, 0, [5, 6], [7, 5], CPU):
        mask = token_mask(0.4, "layer", x) if drops else None
        fast = LoRAFunction.apply(F.linear(x, w), x, a, b, 1.5 / 0.6 if drops else 1.5, mask)
        dropped = token_dropout(x, 0.4, "layer") if drops else x
        plain = F.linear(x, w) + 1.5 * dropped @ a.T @ b.T
        if drops:
            assert (dropped == 0).any()
        assert_same(fast, plain, [x, w, a, b])


@pytest.mark.parametrize("apply", METHODS.values(), ids=METHODS)
def test_loss_and_gradients_of_a_model_match_the_plain_modules(
    tmp_path: Path, tiny_checkpoint: Path, apply: Callable
) -> None:
    """With dropout, after `use_fast_paths` on a copy: names stay, classes change."""
    plain = load_model(tiny_checkpoint, dtype=torch.float32).train()
    apply(plain)
    fast = deepcopy(randomized(plain))
    use_fast_paths(fast)
    assert type(fast).__name__ == "FastLLaMA"
    assert fast.state_dict().keys() == plain.state_dict().keys()
    ids = torch.randint(300, (60,), generator=torch.Generator().manual_seed(1))
    losses = []
    for model in (fast, plain):
        with token_rows(1, 2, [3, 4, 5], [20, 33, 7], CPU):
            loss = model(ids, [20, 33, 7], torch.arange(5, 59), ids[6:])
            loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=1e-6)  # fp32
    for (name, one), two in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            assert (one.grad - two.grad).norm() < 1e-4 * two.grad.norm(), name


@pytest.mark.parametrize("script", ["lora", "adapter_v2", "full"])
def test_a_run_has_the_same_losses_on_fast_and_plain_paths(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, script: str
) -> None:
    curves = []
    flags = {"adapter": AdapterConfig(start_layer=0)} if script == "adapter_v2" else {}
    recipe = dict(batch_size=16, max_steps=10, learning_rate=1e-2, warmup_steps=0)
    for fast_paths in (True, False):
        out = tmp_path / str(fast_paths)
        args = RunArgs(out, tiny_checkpoint, tiny_data, precision="32-true")
        train = TrainArgs(**recipe, fast_paths=fast_paths)
        load_script(f"finetune/{script}.py").main(args, train=train, **flags)
        with (out / "metrics.csv").open(newline="") as file:
            curves.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert curves[0][-1] < curves[0][0] - 0.3
    torch.testing.assert_close(curves[0], curves[1], atol=1e-4, rtol=0)  # fp32
    assert curves[0] != curves[1]  # else the flag did nothing


def test_a_head_that_a_method_wraps_is_part_of_the_loss(tiny_checkpoint: Path) -> None:
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
    use_fast_paths(model)
    actual = model(ids, label_positions=torch.arange(19), labels=ids[1:])
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("apply", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("in_training", [True, False], ids=["masks", "random dropout"])
def test_recomputing_saves_memory_and_changes_no_bit(
    tiny_checkpoint: Path, apply: Callable, fast: bool, in_training: bool
) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.float32).train()
    apply(model)
    randomized(model)
    ids = torch.randint(300, (60,), generator=torch.Generator().manual_seed(1))
    results, saved = [], []
    for level in ("none", "none", "activations", "block"):  # the first one also makes tables
        copy = deepcopy(model)
        optimize_for_training(copy, CPU, fast, level)
        torch.manual_seed(3)
        rows = token_rows(1, 2, [3, 4, 5], [20, 33, 7], CPU) if in_training else nullcontext()
        with rows, Counter() as counter:
            before = counter.live
            loss = copy(ids, [20, 33, 7], torch.arange(5, 59), ids[6:])
            saved.append(counter.live - before)
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in copy.parameters() if p.requires_grad)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert saved[1] > saved[2] > saved[3]


def test_the_level_on_each_device(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    for device, level, expected in (
        ("cuda", None, "ActivationsBlock"),
        ("cpu", None, "Block"),
        ("cuda", "none", "Block"),
        ("cpu", "block", "WholeBlock"),
    ):
        optimize_for_training(model, torch.device(device), recompute=level)
        assert {type(layer).__name__ for layer in model.layers} == {expected}
