"""Full finetuning: the result is a model folder for `transformers`, in one file or in many."""

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import load_script, save_checkpoint_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_llama.files
from lit_llama import load_model
from lit_llama.training import TrainArgs

INPUT_IDS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))


def train(out_dir: Path, checkpoint: Path, data: Path, precision: str, **recipe) -> list[float]:
    train = TrainArgs(batch_size=16, max_steps=8, learning_rate=1e-3, warmup_steps=0, **recipe)
    load_script("finetune/full.py").main(
        out_dir, train=train, checkpoint_dir=checkpoint, data_dir=data, precision=precision
    )
    with (out_dir / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("precision", DTYPES)
def test_result_loads_in_transformers(
    tmp_path: Path, tiny_data: Path, monkeypatch, capsys, precision: str, tied: bool
) -> None:
    base = tmp_path / "base"
    save_checkpoint_folder(base, num_key_value_heads=2, tie_word_embeddings=tied)
    monkeypatch.setattr(lit_llama.files, "MAX_FILE_BYTES", 30_000)
    with torch.enable_grad():
        losses = train(tmp_path / "out", base, tiny_data, precision)
    assert losses[-1] < losses[0] - 0.1
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    tensors = [load_file(tmp_path / "out" / name) for name in files]
    assert {tensor.dtype for part in tensors for tensor in part.values()} == {DTYPES[precision]}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours = load_model(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(ours(INPUT_IDS), theirs(INPUT_IDS).logits, atol=1e-4, rtol=1e-5)  # fp32
    assert (ours(INPUT_IDS) - load_model(base, dtype=torch.float32)(INPUT_IDS)).std() > 0.01
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("Hello") == (
        AutoTokenizer.from_pretrained(base).encode("Hello")
    )
    capsys.readouterr()
    load_script("generate/full.py").main(tmp_path / "out", prompt="Hello", max_new_tokens=4)
    load_script("generate/full.py").main(tmp_path / "out/step-000008", prompt="Hello", max_new_tokens=4)
    assert "Time for inference 1" in capsys.readouterr().err


def test_mixed_precision_keeps_what_bf16_would_round_away(tmp_path: Path, tiny_data: Path) -> None:
    """Steps of 1e-5 are lost in bf16 weights, and add up in fp32 ones."""
    save_checkpoint_folder(tmp_path / "base")
    before = load_model(tmp_path / "base", dtype=torch.bfloat16).embed_tokens.weight
    changed = {}
    for precision in ("bf16-mixed", "bf16-true"):
        recipe = TrainArgs(batch_size=16, max_steps=2, learning_rate=1e-5, warmup_steps=0)
        flags = dict(checkpoint_dir=tmp_path / "base", data_dir=tiny_data, precision=precision)
        load_script("finetune/full.py").main(tmp_path / precision, train=recipe, **flags)
        (state,) = (tmp_path / precision / "step-000002").glob("state-*.safetensors")
        weight = load_file(state)["embed_tokens.weight@0"]
        changed[precision] = float((weight.float() != before.float()).float().mean())
    assert changed["bf16-mixed"] > 0.5 > 3 * changed["bf16-true"]


def test_activation_checkpointing_changes_nothing_but_memory(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    plain = train(tmp_path / "plain", tiny_checkpoint, tiny_data, "32-true")
    again = train(tmp_path / "again", tiny_checkpoint, tiny_data, "32-true", activation_checkpointing=True)
    assert plain == again
