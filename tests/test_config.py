"""Architectures against published sizes, and `config.json` against `transformers`' reading of it."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_hf_model
from transformers import AutoConfig, AutoModelForCausalLM

from lit_llama import LLaMA, LLaMAConfig, UserError
from lit_llama.config import read_json

# number of parameters that the hub counts for each published model
PUBLISHED = {
    "7B": 6_738_415_616,
    "13B": 13_015_864_320,
    "30B": 32_528_943_616,
    "65B": 65_285_660_672,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "TinyLlama-1.1B": 1_100_048_384,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_from_name_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig.from_name(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'8B'.*Llama-3-8B.*SmolLM2-1.7B"):
        LLaMAConfig.from_name("8B")


@pytest.mark.parametrize("name", ["Llama-2-70B", "Llama-3.2-1B", "SmolLM2-135M"])
def test_saved_config_is_read_by_transformers_as_by_us(tmp_path: Path, name: str) -> None:
    config = LLaMAConfig.from_name(name)
    config.save(tmp_path, torch.bfloat16)
    assert LLaMAConfig.from_checkpoint(tmp_path) == config
    theirs = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    model.tie_weights()  # which transformers 5.0 leaves undone on the meta device
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert theirs.dtype == torch.bfloat16
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["rope_type"] == (config.rope_scaling or {"rope_type": "default"})["rope_type"]
    for field in ("head_dim", "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id"):
        assert getattr(theirs, field) == getattr(config, field)


def test_fields_that_we_do_not_know_survive(tmp_path: Path) -> None:
    make_hf_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pretraining_tp": 1, "my_note": ["kept"]}))
    LLaMAConfig.from_checkpoint(tmp_path).save(tmp_path, torch.float32)
    assert json.loads(file.read_text())["my_note"] == ["kept"]


def test_old_style_rope_scaling_is_read(tmp_path: Path) -> None:
    """transformers before 5 wrote `rope_scaling` with `type`, beside `rope_theta`."""
    LLaMAConfig(rope_theta=5e5).save(tmp_path, torch.float32)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_scaling": {"type": "linear", "factor": 2.0}}))
    config = LLaMAConfig.from_checkpoint(tmp_path)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert config.rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"sliding_window": 4096}, "sliding_window 4096"),
        ({"vocab_size": None}, "'vocab_size' is missing"),
        ({"hidden_size": "4096"}, "'hidden_size' should be int"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' should be int of at least 1"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' should be bool"),
        ({"rms_norm_eps": True}, "'rms_norm_eps' should be float"),
        ({"num_key_value_heads": 3}, "no multiple of 3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor'"),
        ({"rope_scaling": "linear"}, "rope"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    LLaMAConfig().save(tmp_path, torch.float32)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        LLaMAConfig.from_checkpoint(tmp_path)
    assert str(file) in str(error.value)


def test_a_key_that_is_there_twice_with_one_value_is_fine(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1], "b": 2, "a": [1]}')
    assert read_json(tmp_path / "a.json") == {"a": [1], "b": 2}
