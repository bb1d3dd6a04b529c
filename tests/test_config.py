"""Architectures against published sizes, and `config.json` against `transformers`."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_hf_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lit_llama import LLaMA, LLaMAConfig, UserError
from lit_llama.config import LLAMA3_ROPE
from lit_llama.model import rope_frequencies

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
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.3-70B": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B": 7_248_023_552,
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


@pytest.mark.parametrize("name", ["llama-2-7b-hf", "LLAMA-2-7B", "Llama-2-7B-hf"])
def test_names_of_the_hub_are_found(name: str) -> None:
    assert LLaMAConfig.from_name(name) == LLaMAConfig.from_name("Llama-2-7B")


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'8B'.*Llama-3-8B.*SmolLM2-1.7B"):
        LLaMAConfig.from_name("8B")


@pytest.mark.parametrize("name", ["Llama-2-70B", "Llama-3.1-8B", "Mistral-7B", "SmolLM2-135M"])
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


@pytest.mark.parametrize(
    ("plain", "generation", "expected"),
    [
        (2, [2, 96], [2, 96]),
        (2, 96, [2, 96]),
        ([7, 2], [96, 2, 5], [7, 2, 96, 5]),
        (2, 2, 2),
        ([2], None, 2),
        (None, [96], 96),
        (None, [96, 5], [96, 5]),
        (None, None, None),
    ],
    ids=str,
)
def test_end_tokens_of_both_files_count(tmp_path: Path, plain, generation, expected) -> None:
    raw = json.loads(LLaMAConfig().to_json(torch.float32)) | {"eos_token_id": plain}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    options = {"do_sample": True} | ({} if generation is None else {"eos_token_id": generation})
    (tmp_path / "generation_config.json").write_text(json.dumps(options))
    config = LLaMAConfig.from_checkpoint(tmp_path)
    assert config.eos_token_id == expected
    (tmp_path / "config.json").write_text(config.to_json(torch.float32))
    assert LLaMAConfig.from_checkpoint(tmp_path) == config


def test_how_weights_were_stored_is_not_written_back(tmp_path: Path) -> None:
    raw = json.loads(LLaMAConfig().to_json(torch.float32))
    stored = {"quant_method": "gptq", "bits": 4}
    raw |= {"quantization_config": stored, "quantization": stored, "compression_config": stored}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"auto_map": {}, "note": 1}))
    config = LLaMAConfig.from_checkpoint(tmp_path)
    expected = json.loads(LLaMAConfig().to_json(torch.bfloat16)) | {"note": 1}
    assert json.loads(config.to_json(torch.bfloat16)) == expected


ROPES = {
    "absent": None,
    "empty": {},
    "default": {"rope_type": "default"},
    "default, theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "old linear": {"type": "linear", "factor": 2},
    "linear, theta": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    "llama3": LLAMA3_ROPE | {"factor": 8.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("theta", [None, 300.0])
@pytest.mark.parametrize("scaling", ROPES)
@pytest.mark.parametrize("parameters", ROPES)
def test_rope_of_two_fields_is_that_of_transformers(
    tmp_path: Path, parameters: str, scaling: str, theta: float | None
) -> None:
    raw = json.loads(LLaMAConfig(head_dim=16).to_json(torch.float32))
    raw |= {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    for name, value in (
        ("rope_parameters", ROPES[parameters]),
        ("rope_scaling", ROPES[scaling]),
        ("rope_theta", theta),
    ):
        raw.pop(name, None)
        raw |= {} if value is None else {name: value}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = LLaMAConfig.from_checkpoint(tmp_path)
    expected = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path)).inv_freq
    torch.testing.assert_close(rope_frequencies(config), expected)
    # what is written back means the same, to both
    (tmp_path / "config.json").write_text(config.to_json(torch.float32))
    torch.testing.assert_close(
        LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path)).inv_freq, expected
    )


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
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is the text '1e-5', not a number"),
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
