"""Full finetuning: the result is a model folder for `transformers`, in one file or in many."""

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import load_script, save_checkpoint_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_llama import load_model
from lit_llama.runtime.args import RunArgs
from lit_llama.storage import files
from lit_llama.training import TrainArgs

INPUT_IDS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))


def train(out_dir: Path, checkpoint: Path, data: Path, precision: str, **recipe) -> list[float]:
    """Finetune all weights. Returns the losses."""
    recipe = dict(batch_size=16, max_steps=8, learning_rate=1e-3, warmup_steps=0) | recipe
    run = RunArgs(out_dir, checkpoint, data, precision=precision)
    load_script("finetune/full.py").main(run, TrainArgs(**recipe))
    with (out_dir / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("precision", DTYPES)
def test_result_loads_in_transformers(
    tmp_path: Path, tiny_data: Path, monkeypatch, capsys, precision: str, tied: bool
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    save_checkpoint_folder(base, num_key_value_heads=2, tie_word_embeddings=tied)
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 30_000)
    with torch.enable_grad():
        losses = train(out, base, tiny_data, precision)
    assert losses[-1] < losses[0] - 0.1
    names = sorted(path.name for path in out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(names) > 2
    assert sorted(set(index["weight_map"].values())) == names
    tensors = [tensor for name in names for tensor in load_file(out / name).values()]
    assert {tensor.dtype for tensor in tensors} == {DTYPES[precision]}
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours = load_model(out, dtype=torch.float32)(INPUT_IDS)
    torch.testing.assert_close(ours, theirs(INPUT_IDS).logits, atol=1e-4, rtol=1e-5)  # fp32
    assert (ours - load_model(base, dtype=torch.float32)(INPUT_IDS)).std() > 0.01
    ids = [AutoTokenizer.from_pretrained(folder).encode("Hello") for folder in (out, base)]
    assert ids[0] == ids[1]
    generate = load_script("generate/full.py")
    capsys.readouterr()
    for folder in (out, out / "step-000008"):
        generate.main(generate.AnswerArgs("Hello", max_new_tokens=4), folder)
        assert "Time for inference 1" in capsys.readouterr().err


def test_mixed_precision_keeps_updates_that_bf16_would_round_away(
    tmp_path: Path, tiny_data: Path
) -> None:
    """Steps of 1e-5 are lost in bf16 weights, and add up in fp32 ones."""
    save_checkpoint_folder(tmp_path / "base")
    before = load_model(tmp_path / "base", dtype=torch.bfloat16).embed_tokens.weight
    changed = {}
    for precision in ("bf16-mixed", "bf16-true"):
        out = tmp_path / precision
        train(out, tmp_path / "base", tiny_data, precision, max_steps=2, learning_rate=1e-5)
        (state,) = (out / "step-000002").glob("state-*.safetensors")
        weight = load_file(state)["embed_tokens.weight@0"]
        changed[precision] = float((weight.float() != before.float()).float().mean())
    assert changed["bf16-mixed"] > 0.5 > 3 * changed["bf16-true"]


@pytest.mark.parametrize("fast_paths", [True, False])
def test_recomputing_changes_nothing_but_memory(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, fast_paths: bool
) -> None:
    flags = (tiny_checkpoint, tiny_data, "32-true")
    curves = [
        train(tmp_path / level, *flags, recompute=level, fast_paths=fast_paths)
        for level in ("none", "activations", "block")
    ]
    assert curves[0] == curves[1] == curves[2]
