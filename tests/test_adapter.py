"""LLaMA-Adapter: the paper's equations, `peft`'s version of them, and what a file holds."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import make_hf_model
from peft import AdaptionPromptConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_llama import LLaMA, UserError, load_model
from lit_llama.adapter import AdapterConfig, apply_adapter, apply_adapter_v2, load_adapter, save_adapter
from lit_llama.attention import SampleLengths
from lit_llama.lora import LoRAConfig, apply_lora, load_lora, save_lora
from lit_llama.model import rope_table

INPUT_IDS = torch.randint(384, (2, 40), generator=torch.Generator().manual_seed(1))
CONFIG = AdapterConfig(prompt_length=5, start_layer=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_hf_model(num_key_value_heads=2, num_hidden_layers=3).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def randomized(model: LLaMA) -> LLaMA:
    """What a method has added, away from where it does nothing."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def test_attention_is_the_papers(folder: Path) -> None:
    """Section 3.2, equations 4 to 8, token by token and head by head in float64."""
    model = load_model(folder, dtype=torch.float32)
    apply_adapter(model, CONFIG)
    attention = randomized(model).layers[1].self_attn
    heads, kv_heads, d = 4, 2, 8
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    samples = SampleLengths([7], hidden.device)
    actual = attention(hidden, rope_table(model.config, samples.positions), samples, None)

    weights = {name: parameter.double() for name, parameter in attention.named_parameters()}
    q, k, v, o = (weights[f"base.{name}_proj.weight"] for name in "qkvo")
    prompt, gate, x = weights["prompt"], weights["gate"], hidden.double()

    def rotated(vector: Tensor, position: int) -> Tensor:
        angles = position / 10000.0 ** (torch.arange(0, d, 2).double() / d)
        turned = torch.complex(vector[: d // 2], vector[d // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag))

    def head(matrix: Tensor, row: Tensor, index: int) -> Tensor:
        return (matrix @ row)[index * d : (index + 1) * d]

    for t in range(7):
        parts = []
        for h in range(heads):
            g = h * kv_heads // heads
            query = rotated(head(q, x[t], h), t)
            scores = torch.stack([query @ rotated(head(k, x[i], g), i) for i in range(t + 1)]) / math.sqrt(d)
            prompt_scores = torch.stack([query @ head(k, row, g) for row in prompt]) / math.sqrt(d)
            values = torch.stack([head(v, x[i], g) for i in range(t + 1)])
            prompt_values = torch.stack([head(v, row, g) for row in prompt])
            parts.append(scores.softmax(0) @ values + gate[h] * (prompt_scores.softmax(0) @ prompt_values))
        torch.testing.assert_close(actual[t].double(), o @ torch.cat(parts), atol=1e-5, rtol=1e-5)  # fp32


@torch.no_grad()
def test_logits_are_pefts_where_all_heads_have_one_gate(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32)
    apply_adapter(model, CONFIG)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = get_peft_model(base, AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM")).eval()
    for number, layer in enumerate(model.layers[1:], start=1):
        reference = theirs.base_model.model.model.layers[number].self_attn
        layer.self_attn.prompt.copy_(reference.adaption_prompt[0])
        layer.self_attn.gate.fill_(0.3 * number)
        reference.adaption_gate.fill_(0.3 * number)
    plain = load_model(folder, dtype=torch.float32)(INPUT_IDS)
    assert (model(INPUT_IDS) - plain).std() > 0.05
    torch.testing.assert_close(model(INPUT_IDS), theirs(INPUT_IDS).logits, atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("apply", [apply_adapter, apply_adapter_v2], ids=["v1", "v2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cache_and_no_cache_agree_in_both_dtypes(folder: Path, apply, dtype: torch.dtype) -> None:
    model = load_model(folder, dtype=dtype)
    apply(model, CONFIG)
    randomized(model)
    expected = model(INPUT_IDS)
    assert expected.dtype == dtype
    cache = model.make_kv_cache(2, 40)
    actual = torch.cat([model(INPUT_IDS[:, :20], kv_cache=cache), model(INPUT_IDS[:, 20:], kv_cache=cache)], dim=1)
    close = (1e-5, 1e-5) if dtype == torch.float32 else (0.25, 2e-2)  # bf16: 8 bits of logits up to 10 or so
    torch.testing.assert_close(actual, expected, atol=close[0], rtol=close[1])


METHODS = {
    "LoRA": lambda model: apply_lora(model, LoRAConfig(r=4)),
    "LoRA on all": lambda model: apply_lora(model, LoRAConfig(r=4, targets=("all-linear", "lm_head"))),
    "rsLoRA": lambda model: apply_lora(model, LoRAConfig(r=4, use_rslora=True)),
    "DoRA": lambda model: apply_lora(model, LoRAConfig(r=4, use_dora=True, targets=("all-linear",))),
    "adapter": lambda model: apply_adapter(model, CONFIG),
    "adapter v2": lambda model: apply_adapter_v2(model, CONFIG),
    "LoRA, adapter": lambda model: (apply_lora(model, LoRAConfig(r=4)), apply_adapter(model, CONFIG)),
    "adapter, LoRA": lambda model: (apply_adapter(model, CONFIG), apply_lora(model, LoRAConfig(r=4))),
    "DoRA, adapter v2": lambda model: (
        apply_lora(model, LoRAConfig(r=4, use_dora=True, targets=("all-linear",))),
        apply_adapter_v2(model, CONFIG),
    ),
    "adapter v2, LoRA": lambda model: (apply_adapter_v2(model, CONFIG), apply_lora(model, LoRAConfig(r=4))),
    "full": lambda model: model.requires_grad_(True),
}


@torch.no_grad()
@pytest.mark.parametrize("apply", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_at_step_0_every_method_is_the_base(tmp_path: Path, apply, bias: bool, dtype: torch.dtype) -> None:
    make_hf_model(num_key_value_heads=2, attention_bias=bias, mlp_bias=bias).save_pretrained(tmp_path)
    expected = load_model(tmp_path, dtype=dtype)(INPUT_IDS)
    model = load_model(tmp_path, dtype=dtype).train()
    apply(model)
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    assert torch.equal(model(INPUT_IDS), expected)


def trained_by(name: str) -> set[str]:
    """Parts of the names of what each method of METHODS may train."""
    parts = {"LoRA": {".lora_A.", ".lora_B."}, "DoRA": {".lora_"}, "rsLoRA": {".lora_A.", ".lora_B."}}
    parts |= {"LoRA on all": parts["LoRA"], "adapter": {".prompt", ".gate"}}
    parts["adapter v2"] = parts["adapter"] | {".adapter_scale", ".adapter_bias", "norm.weight"}
    return set().union(*(parts[part] for part in name.split(", ")))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_only_what_the_method_has_added_gets_gradients(folder: Path, name: str) -> None:
    model = load_model(folder, dtype=torch.float32).train()
    before = {key for key, _ in model.named_parameters()}
    METHODS[name](model)
    randomized(model)
    model(INPUT_IDS).square().mean().backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(any(part in f".{key}" for part in trained_by(name)) for key in trained), trained
    added = {key for key, _ in model.named_parameters() if key.replace(".base", "") not in before}
    assert added <= trained
    assert all(parameter.grad.norm() > 0 for parameter in model.parameters() if parameter.grad is not None)
    for parameter in model.parameters():
        assert not parameter.requires_grad or parameter.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("apply", [apply_adapter, apply_adapter_v2], ids=["v1", "v2"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_saved_and_loaded_gives_the_same_logits(tmp_path: Path, apply, bias: bool) -> None:
    folder = tmp_path / "base"
    make_hf_model(num_key_value_heads=2, attention_bias=bias, mlp_bias=bias).save_pretrained(folder)
    model = load_model(folder, dtype=torch.float32)
    apply(model, CONFIG)
    randomized(model)
    save_adapter(dict(model.named_parameters()), tmp_path / "adapter", CONFIG, model, base_model="base")
    again = load_model(folder, dtype=torch.float32)
    assert load_adapter(again, tmp_path / "adapter") == CONFIG
    assert torch.equal(again(INPUT_IDS), model(INPUT_IDS))


@torch.no_grad()
def test_lora_and_adapter_of_one_run_are_loaded_together(folder: Path, tmp_path: Path) -> None:
    model, lora = load_model(folder, dtype=torch.float32), LoRAConfig(r=4, targets=("all-linear",))
    apply_lora(model, lora)
    apply_adapter(model, CONFIG)
    randomized(model)
    parameters = dict(model.named_parameters())
    save_lora(parameters, tmp_path, lora)
    save_adapter(parameters, tmp_path / "adapter", CONFIG, model)
    again = load_model(folder, dtype=torch.float32)
    load_adapter(again, tmp_path / "adapter")
    load_lora(again, tmp_path)
    assert torch.equal(again(INPUT_IDS), model(INPUT_IDS))


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    with pytest.raises(UserError, match=r"start_layer 3: the model has 3 layers"):
        apply_adapter(model, AdapterConfig(start_layer=3))
    apply_adapter(model, CONFIG)
    save_adapter(dict(model.named_parameters()), tmp_path / "adapter", CONFIG, model)
    make_hf_model(hidden_size=64, num_hidden_layers=3).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"hidden_size is 32, the model has 64"):
        load_adapter(load_model(tmp_path / "other"), tmp_path / "adapter")
    weights, settings = (tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.2" not in name}, weights)
    with pytest.raises(UserError, match=r"layers.2.self_attn.gate has shape None, the model asks for \(4,\)"):
        load_adapter(load_model(folder), tmp_path / "adapter")
    save_file(tensors, weights)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"prompt_length": 6}))
    with pytest.raises(UserError, match=r"prompt has shape \(5, 32\), the model asks for \(6, 32\)"):
        load_adapter(load_model(folder), tmp_path / "adapter")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"method": "llama_adapter_v3"}))
    with pytest.raises(UserError, match=r"method is 'llama_adapter_v3', not llama_adapter or llama_adapter_v2"):
        load_adapter(load_model(folder), tmp_path / "adapter")


@torch.no_grad()
def test_v2_is_the_papers(folder: Path) -> None:
    """Section 3.2: y = s (W x + b) with s and b learned, and all norms train."""
    model = load_model(folder, dtype=torch.float32)
    apply_adapter_v2(model, CONFIG)
    linear = randomized(model).layers[1].mlp.down_proj
    x = torch.randn(5, linear.base.in_features, generator=torch.Generator().manual_seed(2))
    weight, scale, bias = (t.double() for t in (linear.base.weight, linear.adapter_scale, linear.adapter_bias))
    torch.testing.assert_close(linear(x).double(), scale * (x.double() @ weight.T + bias), atol=1e-5, rtol=1e-5)
    norms = [parameter for name, parameter in model.named_parameters() if name.endswith("norm.weight")]
    assert len(norms) == 2 * 3 + 1
    assert all(parameter.requires_grad for parameter in norms)
