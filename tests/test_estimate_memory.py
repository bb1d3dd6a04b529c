"""The estimate beside what torch's own profiler counts in a real step."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import load_script, make_hf_model

from lit_llama import load_model
from lit_llama.dropout import token_rows
from lit_llama.fast import use_fast_paths
from lit_llama.runtime import cli
from lit_llama.storage.methods import METHODS, FullConfig, Method

SCRIPT = "scripts/estimate_memory.py"
TOKENS = 120


def estimate(monkeypatch, capsys, *flags: object) -> dict[str, float]:
    """Run the script; return bytes by purpose."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, flags)])
    cli.run(load_script(SCRIPT).main)
    lines = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:]]
    return {name.strip(): float(size) * 1e9 for name, size, _ in lines}


def allocated_at_most(trace: Path) -> int:
    """Bytes above those at the start of a profiled block, from the profiler's own events."""
    events = [
        e["args"] for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"
    ]
    totals = [event["Total Allocated"] for event in events]
    return max(totals) - (totals[0] - events[0]["Bytes"])


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.script)
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_activations_are_what_the_profiler_counts(
    method: Method, precision: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    make_hf_model(
        hidden_size=256, intermediate_size=512, num_hidden_layers=6, max_position_embeddings=256
    ).save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--method", method.script, "--device", "cpu"]
    flags += ["--micro_batch_tokens", 16 * TOKENS, "--sample_tokens", TOKENS]
    sizes = estimate(monkeypatch, capsys, *flags, "--precision", precision)

    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    model = load_model(tmp_path / "model", dtype=dtype).train()
    settings = FullConfig(precision) if method.script == "full" else method.config()
    method.apply(model, settings)
    use_fast_paths(model)
    lengths, count = [TOKENS] * 16, 16 * TOKENS
    ids = torch.zeros(count, dtype=torch.long)
    batch = dict(input_ids=ids, label_positions=torch.arange(count), labels=ids)

    def step() -> None:
        autocast = nullcontext()
        if precision == "bf16-mixed":
            autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        with token_rows(0, 0, list(range(16)), lengths, torch.device("cpu")):
            with autocast:
                loss = model(lengths=lengths, **batch)
            loss.backward()

    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    measured = allocated_at_most(tmp_path / "trace.json")
    assert sizes["activations"] == pytest.approx(measured, rel=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sizes["gradients"] == pytest.approx(sum(p.grad.nbytes for p in trained), abs=1e6)
    assert sizes["weights"] == pytest.approx(sum(p.nbytes for p in model.parameters()), abs=1e6)
    adamw = torch.optim.AdamW(trained)
    adamw.step()
    state = sum(t.nbytes for values in adamw.state.values() for t in values.values() if t.dim())
    assert sizes["optimizer"] == pytest.approx(state, abs=1e6)
    assert sizes["total"] == pytest.approx(sum(sizes.values()) - sizes["total"], abs=1e7)


def test_a_new_method_is_estimated_by_the_table(monkeypatch, capsys) -> None:
    new = replace(METHODS["LORA"], script="new")
    monkeypatch.setitem(METHODS, "NEW", new)
    lora = estimate(monkeypatch, capsys, "--model", "SmolLM2-135M", "--lora.r", "64")
    for name in ("new", "NEW"):
        flags = ["--model", "SmolLM2-135M", "--method", name, "--lora.r", "64"]
        assert estimate(monkeypatch, capsys, *flags) == lora


def test_what_saves_memory(monkeypatch, capsys) -> None:
    """What is known of a 7B from its shapes, and the direction of each flag."""
    plain = estimate(monkeypatch, capsys, "--recompute", "none")
    assert plain["weights"] == pytest.approx(2 * 6_738_415_616 + 4 * 4_194_304, abs=1e6)
    assert plain["gradients"] == pytest.approx(4 * 4_194_304, abs=1e6)
    nf4 = estimate(monkeypatch, capsys, "--quantize", "nf4")
    assert nf4["total"] < 7e9
    # 4.25 bits for each weight but the head's and the embedding's, of 16
    assert nf4["weights"] == pytest.approx(6_476_005_376 * 4.25 / 8 + 2 * 262_410_240, rel=0.01)
    default = estimate(monkeypatch, capsys)  # for a GPU of 24 GB
    assert default["activations"] < plain["activations"] / 2
    assert default["total"] < 16.5e9
    blocks = estimate(monkeypatch, capsys, "--recompute", "block")
    assert blocks["activations"] < plain["activations"] / 4
    full = [estimate(monkeypatch, capsys, "--method", "full", "--devices", n) for n in (1, 4)]
    assert full[0]["optimizer"] == pytest.approx(8 * 6_738_415_616, rel=1e-3)
    assert full[1]["optimizer"] == pytest.approx(2 * 6_738_415_616, rel=1e-3)


def test_a_sample_longer_than_a_micro_batch_is_one_of_its_own(monkeypatch, capsys) -> None:
    """As in training, where no sample is split."""
    flags = ["--model", "SmolLM2-135M", "--recompute", "none"]
    flags += ["--sample_tokens", 700, "--micro_batch_tokens"]
    one, short, two = (estimate(monkeypatch, capsys, *flags, n) for n in (700, 200, 1400))
    assert short == one
    assert one["activations"] < 0.7 * two["activations"]


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "mistral-7b", "TinyLlama-1.1B"])
def test_published_models_are_known(name: str, monkeypatch, capsys) -> None:
    small = ["--micro_batch_tokens", 8, "--sample_tokens", 8, "--lora.r", 1]
    sizes = estimate(monkeypatch, capsys, "--model", name, *small)
    expected = {"L": 8_030_261_248, "m": 7_248_023_552, "T": 1_100_048_384}[name[0]]
    assert sizes["weights"] == pytest.approx(2 * expected, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--method", "prefix"],
            "--method prefix: unknown. Known: lora, adapter, adapter_v2, full",
        ),
        (["--device", "tpu"], "--device tpu: should be cuda|cpu"),
        (["--devices", "0"], "--devices 0: should be INT >0"),
        (["--precision", "16"], "--precision 16: should be bf16-mixed|bf16-true|32-true"),
        (["--model", "8B"], "'8B'"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *flags])
    with pytest.raises(SystemExit):
        cli.run(load_script(SCRIPT).main)
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
