"""The forward pass, its loss and its gradients against `transformers`; padding-free rows; the KV cache."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_hf_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedModel

import lit_llama.model
from lit_llama.checkpoint import load_model
from lit_llama.model import LLaMA

SMOLLM2 = ROOT / "checkpoints" / "SmolLM2-135M-Instruct"
LINEAR_ROPE = dict(rope_type="linear", factor=4.0, rope_theta=10000.0)
# of the four wave lengths 6, 63, 628 and 6283 of a head of 8, the first is kept, the second blended, the others slowed
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
    rope_theta=10000.0,
)
ARCHITECTURES = {
    "multi-head": dict(),
    "grouped-query": dict(num_key_value_heads=2),
    "multi-query": dict(num_key_value_heads=1),
    "own head_dim": dict(head_dim=12),
    "tied head": dict(tie_word_embeddings=True),
    "attention bias": dict(attention_bias=True),
    "mlp bias": dict(mlp_bias=True),
    "rms_norm_eps": dict(rms_norm_eps=0.1),
    "rope_theta": dict(rope_parameters=dict(rope_type="default", rope_theta=100.0)),
    "linear rope": dict(rope_parameters=LINEAR_ROPE),
    "llama3 rope": dict(rope_parameters=LLAMA3_ROPE),
}


def both_models(
    folder: Path, hf_model: PreTrainedModel | None = None, dtype: torch.dtype = torch.float32, **settings
) -> tuple[PreTrainedModel, LLaMA]:
    """A random model as `transformers` has it, and as we load it from the folder which that saves."""
    hf_model = make_hf_model(**settings) if hf_model is None else hf_model
    with torch.no_grad():  # transformers starts norms at one and biases at zero, which would hide a forgotten one
        for parameter in hf_model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    hf_model.to(dtype).save_pretrained(folder)
    return hf_model, load_model(folder, dtype=dtype)


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(384, shape, generator=torch.Generator().manual_seed(seed))


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@torch.no_grad()
def assert_logits_match(hf_model: PreTrainedModel, model: LLaMA, input_ids: Tensor) -> None:
    expected = hf_model(input_ids).logits
    assert expected.std() > 0.3  # else an absolute tolerance says nothing
    # fp32 on both sides; only the order of additions differs
    torch.testing.assert_close(model(input_ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_logits_match_transformers(tmp_path: Path, settings: dict) -> None:
    hf_model, model = both_models(tmp_path, **settings)
    assert_logits_match(hf_model, model, random_ids(2, 150))


@pytest.mark.parametrize("rope", [LINEAR_ROPE, LLAMA3_ROPE], ids=["linear", "llama3"])
def test_rope_scaling_changes_logits_as_much_as_in_transformers(tmp_path: Path, rope: dict) -> None:
    scaled, ours_scaled = both_models(tmp_path / "scaled", rope_parameters=rope)
    plain, ours_plain = both_models(tmp_path / "plain")
    input_ids = random_ids(1, 150)
    with torch.no_grad():
        expected = scaled(input_ids).logits - plain(input_ids).logits
        actual = ours_scaled(input_ids) - ours_plain(input_ids)
    assert expected.norm() / plain(input_ids).logits.norm() > 0.05  # the scaling matters in this model
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)  # twice the fp32 tolerance: two differences


def test_logits_match_transformers_mistral(tmp_path: Path) -> None:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=384, num_key_value_heads=2, sliding_window=None, initializer_range=0.2, head_dim=8, **sizes
    )
    hf_model, model = both_models(tmp_path, MistralForCausalLM(config).eval())
    assert_logits_match(hf_model, model, random_ids(2, 60))


@torch.no_grad()
def test_bf16_logits_match_transformers(tmp_path: Path) -> None:
    hf_model, model = both_models(tmp_path, dtype=torch.bfloat16, num_key_value_heads=2)
    input_ids = random_ids(2, 150)
    logits = model(input_ids)
    assert logits.dtype == torch.bfloat16
    # bf16 has 8 bits: 0.4% a rounding, over a few dozen of them
    assert relative_difference(logits, hf_model(input_ids).logits) < 2e-2


@torch.no_grad()
def test_rope_angles_are_fp32_in_bf16_model(tmp_path: Path) -> None:
    """Late positions in bf16 would be rounded to multiples of four; the first layer's keys tell."""
    hf_model, model = both_models(tmp_path, dtype=torch.bfloat16)
    input_ids = random_ids(1, 500)
    kv_cache = model.make_kv_cache(1, 500)
    model(input_ids, kv_cache=kv_cache)
    expected = hf_model(input_ids, use_cache=True).past_key_values.layers[0].keys
    # a few bf16 roundings of 0.4% (transformers rounds cos and sin too); angles in bf16 would be wrong by radians
    assert relative_difference(kv_cache.keys[0], expected) < 2e-2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_flat_and_int32_ids_give_transformers_logits(tmp_path: Path, dtype: torch.dtype) -> None:
    hf_model, model = both_models(tmp_path)
    input_ids = random_ids(30)
    expected = hf_model(input_ids[None]).logits[0]
    torch.testing.assert_close(model(input_ids.to(dtype)), expected, atol=1e-4, rtol=0)  # fp32


@torch.no_grad()
def test_positions_pick_rows_of_transformers_logits(tmp_path: Path) -> None:
    hf_model, model = both_models(tmp_path)
    input_ids, positions = random_ids(2, 15), torch.tensor([0, 7, 14, 15, 29])
    expected = hf_model(input_ids).logits.flatten(0, 1)[positions]
    torch.testing.assert_close(model(input_ids, positions=positions), expected, atol=1e-4, rtol=0)  # fp32


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[7], [9, 9, 9], [5, 1, 17, 8], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("settings", [{}, dict(num_key_value_heads=2)], ids=["multi-head", "grouped-query"])
def test_samples_end_to_end_match_transformers_one_at_a_time(
    tmp_path: Path, lengths: list[int], settings: dict
) -> None:
    hf_model, model = both_models(tmp_path, **settings)
    input_ids = random_ids(sum(lengths))
    expected = torch.cat([hf_model(sample[None]).logits[0] for sample in input_ids.split(lengths)])
    torch.testing.assert_close(model(input_ids, lengths), expected, atol=1e-4, rtol=0)  # fp32


def hf_loss(hf_model: PreTrainedModel, input_ids: Tensor, lengths: list[int], positions: Tensor, labels: Tensor):
    """Cross entropy over the labels, each sample alone through `transformers`, all logits at once."""
    logits = torch.cat([hf_model(sample[None]).logits[0] for sample in input_ids.split(lengths)])
    return F.cross_entropy(logits[positions], labels, reduction="sum")


@pytest.mark.parametrize("chunk", [4, 11, 256])
def test_loss_matches_cross_entropy_of_transformers(tmp_path: Path, monkeypatch, chunk: int) -> None:
    monkeypatch.setattr(lit_llama.model, "LOSS_CHUNK", chunk)
    hf_model, model = both_models(tmp_path)
    lengths, positions = [6, 13, 4], torch.tensor([3, 4, 5, 8, 9, 15, 18, 20, 21, 22, 0])
    input_ids, labels = random_ids(23), random_ids(len(positions), seed=2)
    loss = model(input_ids, lengths, positions, labels)
    assert loss.dtype == torch.float32
    expected = hf_loss(hf_model, input_ids, lengths, positions, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # fp32, a sum of eleven


def test_loss_over_all_tokens_matches_cross_entropy_of_transformers(tmp_path: Path) -> None:
    hf_model, model = both_models(tmp_path)
    input_ids, labels, positions = random_ids(23), random_ids(23, seed=2), torch.arange(23)
    expected = hf_loss(hf_model, input_ids, [23], positions, labels)
    loss = model(input_ids, positions=positions, labels=labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # fp32


@pytest.mark.parametrize("lengths", [[12, 12], [6, 13, 5]], ids=["uniform", "ragged"])
@pytest.mark.parametrize(
    "settings",
    [dict(num_key_value_heads=2, attention_bias=True), dict(tie_word_embeddings=True)],
    ids=["grouped-query", "tied head"],
)
def test_gradients_of_all_weights_match_transformers(
    tmp_path: Path, monkeypatch, settings: dict, lengths: list[int]
) -> None:
    """What is computed again in the backward pass gives the gradients of plain autograd, which keeps everything."""
    monkeypatch.setattr(lit_llama.model, "LOSS_CHUNK", 7)
    hf_model, model = both_models(tmp_path, **settings)
    model.requires_grad_(True).train()
    input_ids, positions = random_ids(24), torch.arange(2, 23)
    labels = random_ids(len(positions), seed=2)
    hf_loss(hf_model, input_ids, lengths, positions, labels).backward()
    model(input_ids, lengths, positions, labels).backward()
    expected = {name.removeprefix("model."): parameter.grad for name, parameter in hf_model.named_parameters()}
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        # fp32 through two layers, there and back
        assert relative_difference(actual[name], gradient) < 1e-4, name


def test_only_weights_live_on_the_model(tmp_path: Path) -> None:
    """A model on the meta device needs its weights and nothing else to run, as `transformers` names them."""
    hf_model, model = both_models(tmp_path)
    assert not list(model.buffers())
    assert {name.removeprefix("model.") for name in hf_model.state_dict()} == set(model.state_dict())


@torch.no_grad()
def greedy_without_cache(model: nn.Module, input_ids: Tensor, steps: int) -> Tensor:
    """The plain neighbour of decoding with a cache: the whole row again for every token."""
    for _ in range(steps):
        logits = model(input_ids)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        input_ids = torch.cat((input_ids, logits[:, -1:].argmax(-1)), dim=1)
    return input_ids


@torch.no_grad()
def greedy_with_cache(model: LLaMA, input_ids: Tensor, steps: int, chunk: int | None = None) -> Tensor:
    """Greedy decoding whose prefill is cut into chunks of `chunk` tokens."""
    kv_cache = model.make_kv_cache(len(input_ids), input_ids.size(1) + steps)
    for part in input_ids.split(chunk or input_ids.size(1), dim=1):
        logits = model(part, kv_cache=kv_cache)
    for _ in range(steps):
        token = logits[:, -1:].argmax(-1)
        input_ids = torch.cat((input_ids, token), dim=1)
        logits = model(token, kv_cache=kv_cache)
    assert kv_cache.longest == input_ids.size(1)
    return input_ids


@pytest.fixture(scope="module")
def decoding_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, LLaMA]:
    return both_models(tmp_path_factory.mktemp("model"), num_key_value_heads=2)


@pytest.mark.parametrize("prefill", range(1, 21))
def test_greedy_with_kv_cache_matches_transformers_without(decoding_pair, prefill: int) -> None:
    hf_model, model = decoding_pair
    input_ids = random_ids(1, prefill)
    assert greedy_with_cache(model, input_ids, 12).tolist() == greedy_without_cache(hf_model, input_ids, 12).tolist()


@pytest.mark.parametrize("chunk", [1, 4, 7, 10])
def test_chunked_prefill_of_a_batch_matches_transformers(decoding_pair, chunk: int) -> None:
    hf_model, model = decoding_pair
    input_ids = random_ids(3, 10)
    expected = greedy_without_cache(hf_model, input_ids, 8)
    assert len({tuple(row) for row in expected[:, 10:].tolist()}) == 3  # the rows are not alike
    assert greedy_with_cache(model, input_ids, 8, chunk).tolist() == expected.tolist()


@torch.no_grad()
def test_logits_with_kv_cache_match_transformers(decoding_pair) -> None:
    hf_model, model = decoding_pair
    input_ids = random_ids(3, 25)
    kv_cache = model.make_kv_cache(3, 25)
    parts = [model(part, kv_cache=kv_cache) for part in input_ids.split([9, 1, 6, 1, 8], dim=1)]
    expected = hf_model(input_ids).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=0)  # fp32


@torch.no_grad()
def test_kv_cache_holds_what_that_of_transformers_holds(decoding_pair) -> None:
    hf_model, model = decoding_pair
    input_ids = random_ids(2, 11)
    kv_cache = model.make_kv_cache(2, 11)
    model(input_ids, kv_cache=kv_cache)
    for index, layer in enumerate(hf_model(input_ids, use_cache=True).past_key_values.layers):
        torch.testing.assert_close(kv_cache.keys[index], layer.keys, atol=1e-4, rtol=0)  # fp32
        torch.testing.assert_close(kv_cache.values[index], layer.values, atol=1e-4, rtol=0)


@torch.no_grad()
def test_kv_cache_overflow_raises_before_anything_is_written(decoding_pair) -> None:
    _, model = decoding_pair
    kv_cache = model.make_kv_cache(1, 6)
    model(random_ids(1, 5), kv_cache=kv_cache)
    before = kv_cache.keys.clone()
    with pytest.raises(ValueError, match="7 tokens do not fit into a KV cache of 6"):
        model(random_ids(1, 2), kv_cache=kv_cache)
    assert kv_cache.longest == 5
    torch.testing.assert_close(kv_cache.keys, before, atol=0, rtol=0)
    model(random_ids(1, 1), kv_cache=kv_cache)  # the last place is still free


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_cache_has_the_models_dtype_and_only_key_value_heads(tmp_path: Path, dtype: torch.dtype) -> None:
    hf_model, model = both_models(tmp_path, dtype=dtype, num_key_value_heads=2)
    kv_cache = model.make_kv_cache(3, 17)
    expected = hf_model(random_ids(3, 17), use_cache=True).past_key_values.layers
    for ours, theirs in ((kv_cache.keys, "keys"), (kv_cache.values, "values")):
        assert ours.dtype == dtype
        assert len(ours) == len(expected)
        assert ours[0].shape == getattr(expected[0], theirs).shape
    assert kv_cache.longest == 0
    assert kv_cache.keys.shape[3] == 17


PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "2, 4, 6, 8,",
    "Water boils at a temperature of",
)


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, LLaMA, list[Tensor]]:
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip("no SmolLM2-135M-Instruct in checkpoints/")
    hf_model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    return hf_model, load_model(SMOLLM2, dtype=torch.float32), prompts


@torch.no_grad()
def test_smollm2_logits_match_transformers(smollm2) -> None:
    hf_model, model, prompts = smollm2
    for input_ids in prompts:
        # fp32 through 30 layers, logits of about 10: a few dozen roundings of 1e-6
        torch.testing.assert_close(model(input_ids), hf_model(input_ids).logits, atol=1e-4, rtol=0)


def test_smollm2_greedy_text_matches_transformers(smollm2) -> None:
    hf_model, model, prompts = smollm2
    for input_ids in prompts:
        expected = hf_model.generate(input_ids, do_sample=False, min_new_tokens=64, max_new_tokens=64, eos_token_id=-1)
        assert greedy_with_cache(model, input_ids, 64).tolist() == expected.tolist()
