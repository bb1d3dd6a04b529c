"""LLaMA-Adapter against the paper's equations and `peft`; combined with LoRA; saved and loaded."""

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
from lit_llama.adapter import AdapterConfig, apply_adapter, apply_adapter_v2
from lit_llama.lora import LoRAConfig, apply_lora, load_lora
from lit_llama.model import Context, PackedSequences, rope_table
from lit_llama.storage import methods
from lit_llama.storage.methods import SaveInfo, load_method, save_methods
from lit_llama.wrapping import base_name, unfreeze

INPUT_IDS = torch.randint(384, (2, 40), generator=torch.Generator().manual_seed(1))
CONFIG = AdapterConfig(prompt_length=5, start_layer=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_hf_model(num_key_value_heads=2, num_hidden_layers=3).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def randomized(model: LLaMA) -> LLaMA:
    """Move trained parameters away from where a method starts and does nothing."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def test_attention_matches_the_paper(folder: Path) -> None:
    """Section 3.2, equations 4 to 8, token by token and head by head in float64."""
    model = load_model(folder, dtype=torch.float32)
    apply_adapter(model, CONFIG)
    attention = randomized(model).layers[1].self_attn
    heads, kv_heads, d = 4, 2, 8
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    seqs = PackedSequences([7], hidden.device)
    actual = attention(hidden, Context(rope_table(model.config, seqs.positions), seqs, None))

    weights = {name: parameter.double() for name, parameter in attention.named_parameters()}
    q, k, v, o = (weights[f"base.{name}_proj.weight"] for name in "qkvo")
    prompt, gate, x = weights["prompt"], weights["gate"], hidden.double()

    def rotated(vector: Tensor, position: int) -> Tensor:
        angles = position / 10000.0 ** (torch.arange(0, d, 2).double() / d)
        turned = torch.complex(vector[: d // 2], vector[d // 2 :]) * torch.exp(1j * angles)
        return torch.cat((turned.real, turned.imag))

    def head(matrix: Tensor, row: Tensor, index: int) -> Tensor:
        return (matrix @ row)[index * d : (index + 1) * d]

    for t in range(7):
        parts = []
        for h in range(heads):
            g = h * kv_heads // heads
            query = rotated(head(q, x[t], h), t)
            keys = torch.stack([rotated(head(k, x[i], g), i) for i in range(t + 1)])
            prompt_keys = torch.stack([head(k, row, g) for row in prompt])
            values = torch.stack([head(v, x[i], g) for i in range(t + 1)])
            prompt_values = torch.stack([head(v, row, g) for row in prompt])
            attended = (keys @ query / math.sqrt(d)).softmax(0) @ values
            to_prompt = (prompt_keys @ query / math.sqrt(d)).softmax(0) @ prompt_values
            parts.append(attended + gate[h] * to_prompt)
        torch.testing.assert_close(
            actual[t].double(), o @ torch.cat(parts), atol=1e-5, rtol=1e-5
        )  # fp32


@torch.no_grad()
def test_logits_match_peft_if_all_heads_have_one_gate(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32)
    apply_adapter(model, CONFIG)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM")
    theirs = get_peft_model(base, settings).eval()
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
    actual = torch.cat([model(part, kv_cache=cache) for part in INPUT_IDS.split(20, 1)], dim=1)
    # bf16: 8 bits of logits up to 10 or so
    atol, rtol = (1e-5, 1e-5) if dtype == torch.float32 else (0.25, 2e-2)
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


DORA = LoRAConfig(r=4, use_dora=True, targets=("all-linear",))
EVERY_LINEAR = LoRAConfig(r=4, dropout=0.0, targets=("all-linear", "lm_head"))
METHODS = {
    "LoRA": lambda model: apply_lora(model, LoRAConfig(r=4)),
    "LoRA on all": lambda model: apply_lora(model, EVERY_LINEAR),
    "rsLoRA": lambda model: apply_lora(model, LoRAConfig(r=4, use_rslora=True)),
    "DoRA": lambda model: apply_lora(model, DORA),
    "adapter": lambda model: apply_adapter(model, CONFIG),
    "adapter v2": lambda model: apply_adapter_v2(model, CONFIG),
    "LoRA, adapter": lambda model: (METHODS["LoRA"](model), METHODS["adapter"](model)),
    "adapter, LoRA": lambda model: (METHODS["adapter"](model), METHODS["LoRA"](model)),
    "DoRA, adapter v2": lambda model: (METHODS["DoRA"](model), METHODS["adapter v2"](model)),
    "adapter v2, LoRA": lambda model: (METHODS["adapter v2"](model), METHODS["LoRA"](model)),
    "full": lambda model: unfreeze(model, "32-true"),
}


@torch.no_grad()
@pytest.mark.parametrize("apply", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_at_step_0_every_method_equals_the_base(
    tmp_path: Path, apply, bias: bool, dtype: torch.dtype
) -> None:
    biases = dict(attention_bias=bias, mlp_bias=bias)
    make_hf_model(num_key_value_heads=2, **biases).save_pretrained(tmp_path)
    expected = load_model(tmp_path, dtype=dtype)(INPUT_IDS)
    model = load_model(tmp_path, dtype=dtype).train()
    apply(model)
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    assert torch.equal(model(INPUT_IDS), expected)


def trained_by(name: str) -> set[str]:
    """Return parts of the names of all parameters that a method may train."""
    matrices, prompt = {".lora_A.", ".lora_B."}, {".prompt", ".gate"}
    parts = dict.fromkeys(("LoRA", "LoRA on all", "rsLoRA"), matrices)
    parts |= {"DoRA": {".lora_"}, "adapter": prompt}
    parts["adapter v2"] = prompt | {".adapter_scale", ".adapter_bias", "norm.weight"}
    return set().union(*(parts[part] for part in name.split(", ")))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_only_parameters_of_the_method_get_gradients(folder: Path, name: str) -> None:
    model = load_model(folder, dtype=torch.float32).train()
    before = {key for key, _ in model.named_parameters()}
    METHODS[name](model)
    randomized(model)
    model(INPUT_IDS).square().mean().backward()
    parameters = dict(model.named_parameters())
    trained = {key for key, parameter in parameters.items() if parameter.grad is not None}
    assert trained == {key for key, parameter in parameters.items() if parameter.requires_grad}
    assert all(any(part in f".{key}" for part in trained_by(name)) for key in trained), trained
    assert {key for key in parameters if base_name(key) not in before} <= trained
    for key in trained:
        assert parameters[key].grad.norm() > 0
        assert parameters[key].dtype == torch.float32


def save(model: LLaMA, path: Path, **configs: AdapterConfig | LoRAConfig) -> None:
    save_methods(path, model.named_parameters(), configs, SaveInfo(model, "base", "alpaca"))


@torch.no_grad()
@pytest.mark.parametrize("method", ["llama_adapter", "llama_adapter_v2"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_a_saved_adapter_loads_with_the_same_logits(
    tmp_path: Path, method: str, bias: bool
) -> None:
    folder = tmp_path / "base"
    biases = dict(attention_bias=bias, mlp_bias=bias)
    make_hf_model(num_key_value_heads=2, **biases).save_pretrained(folder)
    model = load_model(folder, dtype=torch.float32)
    apply = {"llama_adapter": apply_adapter, "llama_adapter_v2": apply_adapter_v2}[method]
    apply(model, CONFIG)
    save(randomized(model), tmp_path / "adapter", **{method: CONFIG})
    loaded = load_model(folder, dtype=torch.float32)
    load_method(loaded, tmp_path / "adapter")
    assert torch.equal(loaded(INPUT_IDS), model(INPUT_IDS))


@torch.no_grad()
def test_lora_and_adapter_of_one_run_load_together(folder: Path, tmp_path: Path) -> None:
    model, lora = load_model(folder, dtype=torch.float32), LoRAConfig(r=4, targets=("all-linear",))
    apply_lora(model, lora)
    apply_adapter(model, CONFIG)
    save(randomized(model), tmp_path / "lora", LORA=lora, llama_adapter=CONFIG)
    loaded, merged = (load_model(folder, dtype=torch.float32) for _ in range(2))
    methods.METHODS["llama_adapter"].load(loaded, tmp_path / "lora/adapter")
    load_lora(loaded, tmp_path / "lora")
    assert torch.equal(loaded(INPUT_IDS), model(INPUT_IDS))
    load_method(merged, tmp_path / "lora")
    expected = model(INPUT_IDS)
    assert (merged(INPUT_IDS) - expected).norm() < 1e-5 * expected.norm()  # fp32


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    model = load_model(folder)
    with pytest.raises(UserError, match=r"start_layer 3: the model has 3 layers"):
        apply_adapter(model, AdapterConfig(start_layer=3))
    apply_adapter(model, CONFIG)
    save(model, path, llama_adapter=CONFIG)
    make_hf_model(hidden_size=64, num_hidden_layers=3).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"another model .*prompt: .*\[5, 32\].*\[5, 64\]"):
        load_method(load_model(tmp_path / "other"), path)
    weights, settings = (
        path / name for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    tensors, values = load_file(weights), json.loads(settings.read_text())
    save_file({key: tensor for key, tensor in tensors.items() if "layers.2" not in key}, weights)
    with pytest.raises(UserError, match=r"layers\.2\.self_attn\.\w+ is not in both"):
        load_method(load_model(folder), path)
    save_file(tensors, weights)
    settings.write_text(json.dumps(values | {"prompt_length": 6}))
    with pytest.raises(UserError, match=r"prompt: .* torch.Size\(\[5, 32\]\).*\[6, 32\]"):
        load_method(load_model(folder), path)
    settings.write_text(json.dumps(values | {"method": "llama_adapter_v3"}))
    with pytest.raises(
        UserError, match=r"'llama_adapter_v3' is not supported. Known: LORA, llama_a"
    ):
        load_method(load_model(folder), path)


@torch.no_grad()
def test_v2_matches_the_paper(folder: Path) -> None:
    """Section 3.2: y = s (W x + b) with s and b learned, and all norms train."""
    model = load_model(folder, dtype=torch.float32)
    apply_adapter_v2(model, CONFIG)
    linear = randomized(model).layers[1].mlp.down_proj
    x = torch.randn(5, linear.base.in_features, generator=torch.Generator().manual_seed(2))
    weight, scale, bias = linear.base.weight, linear.adapter_scale, linear.adapter_bias
    expected = scale.double() * (x.double() @ weight.double().T + bias.double())
    torch.testing.assert_close(linear(x).double(), expected, atol=1e-5, rtol=1e-5)
    norms = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
    assert len(norms) == 2 * 3 + 1
    assert all(parameter.requires_grad for parameter in norms)
