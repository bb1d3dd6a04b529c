"""Architectures against published sizes, and `config.json` against `transformers`."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_hf_model
from transformers import AutoConfig, AutoModelForCausalLM

from lit_llama import LLaMA, LLaMAConfig, UserError

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
    (tmp_path / "config.json").write_text(config.to_json(torch.bfloat16))
    assert LLaMAConfig.from_checkpoint(tmp_path) == config
    theirs = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    model.tie_weights()  # which transformers 5.0 leaves undone on the meta device
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert theirs.dtype == torch.bfloat16
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert (
        theirs.rope_parameters["rope_type"]
        == (config.rope_scaling or {"rope_type": "default"})["rope_type"]
    )
    for field in (
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
    ):
        assert getattr(theirs, field) == getattr(config, field)


def test_unknown_fields_are_written_back(tmp_path: Path) -> None:
    make_hf_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"pretraining_tp": 1, "my_note": ["kept"]}))
    file.write_text(LLaMAConfig.from_checkpoint(tmp_path).to_json(torch.float32))
    assert json.loads(file.read_text())["my_note"] == ["kept"]


def test_old_style_rope_scaling_is_read(tmp_path: Path) -> None:
    """transformers before 5 wrote `rope_scaling` with `type`, beside `rope_theta`."""
    raw = json.loads(LLaMAConfig(rope_theta=5e5).to_json(torch.float32))
    raw["rope_scaling"] = {"type": "linear", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(raw))
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
        ({"num_key_value_heads": 3}, "3 key/value heads.*not divisible"),
        ({"head_dim": 5}, "head_dim 5: not divisible"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'.*not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor'"),
    ],
    ids=str,
)
def test_unsupported_models_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(LLaMAConfig().to_json(torch.float32)) | change))
    with pytest.raises(UserError, match=message) as error:
        LLaMAConfig.from_checkpoint(tmp_path)
    assert str(file) in str(error.value)


def test_missing_and_truncated_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json there.*scripts/download.py"):
        LLaMAConfig.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(LLaMAConfig().to_json(torch.float32)[:100])
    with pytest.raises(UserError, match=r"config.json: cannot be read"):
        LLaMAConfig.from_checkpoint(tmp_path)


def test_absent_head_sizes_are_derived(tmp_path: Path) -> None:
    make_hf_model().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    expected = LLaMAConfig.from_checkpoint(tmp_path)
    for name in ("head_dim", "num_key_value_heads"):
        del raw[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert LLaMAConfig.from_checkpoint(tmp_path) == expected
    assert expected.head_dim == 8
