"""Model folders whose files do not agree with their config.json, against `transformers`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import load_script, save_checkpoint_folder
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_llama import UserError, load_model
from lit_llama.lora import LoRAConfig, apply_lora, save_lora
from lit_llama.runtime.args import RunArgs
from lit_llama.storage.model_folder import model_config, untrained_tokens
from lit_llama.training import TrainArgs

INPUT_IDS = torch.arange(3, 33)[None]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def change_config(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def to_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@torch.no_grad()
def assert_same_as_transformers(folder: Path, other: Path | None = None) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(other or folder, dtype=torch.float32)
    ours = load_model(folder, dtype=torch.float32)
    torch.testing.assert_close(ours(INPUT_IDS), theirs(INPUT_IDS).logits, atol=1e-4, rtol=0)  # fp32


def store_twice(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def store_as_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def change_one_value(tensors: dict[str, Tensor]) -> None:
    store_twice(tensors)
    tensors[HEAD][5, 3] += 0.5


def store_another_dtype(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].double()


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("change", "tied"),
    [
        (store_twice, True),
        (store_as_head, True),
        (store_another_dtype, True),
        (change_one_value, False),
    ],
)
def test_the_weights_tell_whether_the_head_is_tied(
    tmp_path: Path, change: Callable, tied: bool, layout: str
) -> None:
    save_checkpoint_folder(tmp_path, tie_word_embeddings=True)
    change_weights(tmp_path, change)
    if layout == "bin":
        to_bin(tmp_path)
    assert_same_as_transformers(tmp_path)
    assert model_config(tmp_path).tie_word_embeddings is tied
    assert (load_model(tmp_path).lm_head is None) is tied


def test_a_head_of_its_own_in_another_shard_is_found(tmp_path: Path) -> None:
    hf_model = save_checkpoint_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    hf_model.save_pretrained(tmp_path, max_shard_size="40KB")
    change_config(tmp_path, tie_word_embeddings=True)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map[HEAD] != weight_map[EMBEDDING]
    assert_same_as_transformers(tmp_path)


def test_an_untied_head_that_is_missing_is_one_line(tmp_path: Path) -> None:
    """transformers would start it at random."""
    save_checkpoint_folder(tmp_path, tie_word_embeddings=True)
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"lm_head.weight.*set tie_word_embeddings to true"):
        load_model(tmp_path)


def test_a_tied_model_without_embedding_and_head_is_one_line(tmp_path: Path) -> None:
    save_checkpoint_folder(tmp_path, tie_word_embeddings=True)
    change_weights(tmp_path, lambda tensors: tensors.pop(EMBEDDING))
    with pytest.raises(UserError, match=r"do not match in \['embed_tokens.weight'\]"):
        load_model(tmp_path)


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    """A folder with a head of its own; its config.json says that it is tied, and quantized."""
    folder = tmp_path / "untied"
    save_checkpoint_folder(folder, num_key_value_heads=2)
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    change_config(folder, tie_word_embeddings=True, quantization_config=quantized)
    return folder


def assert_clean(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    assert raw["tie_word_embeddings"] is False
    assert "quantization_config" not in raw
    assert_same_as_transformers(folder)


def test_merging_keeps_the_head_and_drops_the_quantization(tmp_path: Path, untied: Path) -> None:
    model = load_model(untied)
    config = LoRAConfig(targets=("q_proj",))
    apply_lora(model, config)
    save_lora(dict(model.named_parameters()), tmp_path / "lora", config, str(untied))
    load_script("scripts/merge_lora.py").main(tmp_path / "lora", tmp_path / "merged")
    assert_clean(tmp_path / "merged")
    # B is zero, so nothing is merged
    expected = load_file(untied / "model.safetensors")
    actual = load_file(tmp_path / "merged/model.safetensors")
    for name in (EMBEDDING, HEAD):
        assert torch.equal(actual[name], expected[name].to(actual[name]))


def test_full_finetuning_trains_and_saves_the_head(
    tmp_path: Path, untied: Path, tiny_data: Path
) -> None:
    run = RunArgs(tmp_path / "out", untied, tiny_data, precision="32-true")
    train = TrainArgs(max_steps=1, batch_size=4, warmup_steps=0)
    load_script("finetune/full.py").main(run, train=train)
    assert_clean(tmp_path / "out")
    before = load_file(untied / "model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    steps = [(after[name] - before[name]).abs().max() for name in (EMBEDDING, HEAD)]
    assert all(0 < step < 1e-3 for step in steps)


def quantize_4bit(tensors: dict[str, Tensor]) -> None:
    weight = tensors[f"{Q_PROJ}.weight"]
    tensors[f"{Q_PROJ}.weight"] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    tensors[f"{Q_PROJ}.weight.absmax"] = torch.zeros(16)


def quantize_8bit(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.weight"] = tensors[f"{Q_PROJ}.weight"].to(torch.int8)


def quantize_packed(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.qweight"] = tensors.pop(f"{Q_PROJ}.weight")[:4].int()
    tensors[f"{Q_PROJ}.scales"] = torch.ones(1, 32)


@pytest.mark.parametrize("change", [quantize_4bit, quantize_8bit, quantize_packed])
def test_weights_that_are_quantized_are_named_as_such(tmp_path: Path, change: Callable) -> None:
    save_checkpoint_folder(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(UserError, match=r"q_proj.*quantized folders do not load. Download the unq"):
        load_model(tmp_path)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_untrained_tokens(tmp_path: Path, layout: str) -> None:
    save_checkpoint_folder(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[EMBEDDING][3] = 0
        tensors[EMBEDDING][4] = 0.25
        tensors[HEAD][7] = 0
        tensors[EMBEDDING][9] = tensors[EMBEDDING][8]
        tensors[EMBEDDING][11] = tensors[EMBEDDING][10]
        tensors[EMBEDDING][12] = 1e-20 * tensors[EMBEDDING][12]

    change_weights(tmp_path, change)
    if layout == "bin":
        to_bin(tmp_path)
    # 11 is not among them, so nothing tells that 10 is like it
    assert untrained_tokens(tmp_path, range(3, 11)) == [3, 4, 7, 8, 9]
    assert untrained_tokens(tmp_path, [1, 2, 2, 10, 12, 10**6, -1]) == [12]
    assert untrained_tokens(tmp_path, iter([3, 5])) == [3]


def test_untrained_tokens_of_a_tied_head_and_without_weights(tmp_path: Path) -> None:
    save_checkpoint_folder(tmp_path, tie_word_embeddings=True)
    change_weights(tmp_path, lambda tensors: tensors[EMBEDDING][4].zero_())
    assert untrained_tokens(tmp_path, [3, 4]) == [4]
    (tmp_path / "model.safetensors").unlink()
    assert untrained_tokens(tmp_path, [3, 4]) == []
