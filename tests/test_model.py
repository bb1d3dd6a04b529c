"""The model against `transformers`: logits, loss, gradients; packed attention against torch's."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_hf_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from lit_llama import LLaMA, load_model
from lit_llama.fast import modules, use_fast_paths
from lit_llama.generation import generate
from lit_llama.model import PackedSequences, causal_attention

SMOLLM2 = ROOT / "checkpoints" / "SmolLM2-135M-Instruct"
LINEAR_ROPE = dict(rope_type="linear", factor=4.0, rope_theta=10000.0)
# Of the wave lengths 6, 63, 628 and 6283 of a head of 8, the first stays, the second is blended,
# the others are slowed down.
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
    folder: Path,
    hf_model: PreTrainedModel | None = None,
    dtype: torch.dtype = torch.float32,
    **settings,
) -> tuple[PreTrainedModel, LLaMA]:
    """Return a random model of `transformers`, and ours loaded from the folder that it saves."""
    hf_model = make_hf_model(**settings) if hf_model is None else hf_model
    # Norms start at one and biases at zero, which would hide a forgotten one.
    with torch.no_grad():
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
    # The scaling matters in this model.
    assert expected.norm() / plain(input_ids).logits.norm() > 0.05
    # Twice the fp32 tolerance: two differences.
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)


def test_logits_match_transformers_mistral(tmp_path: Path) -> None:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    sizes |= dict(vocab_size=384, num_key_value_heads=2, head_dim=8)
    config = MistralConfig(sliding_window=None, initializer_range=0.2, **sizes)
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
    # A few bf16 roundings of 0.4% (transformers rounds cos and sin too); angles in bf16 would be
    # wrong by radians.
    assert relative_difference(kv_cache.keys[0], expected) < 2e-2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_flat_and_int32_ids_give_transformers_logits(tmp_path: Path, dtype: torch.dtype) -> None:
    hf_model, model = both_models(tmp_path)
    input_ids = random_ids(30)
    expected = hf_model(input_ids[None]).logits[0]
    torch.testing.assert_close(model(input_ids.to(dtype)), expected, atol=1e-4, rtol=0)  # fp32


@torch.no_grad()
def test_label_positions_select_transformers_logits(tmp_path: Path) -> None:
    hf_model, model = both_models(tmp_path)
    input_ids, positions = random_ids(2, 15), torch.tensor([0, 7, 14, 15, 29])
    expected = hf_model(input_ids).logits.flatten(0, 1)[positions]
    actual = model(input_ids, label_positions=positions)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)  # fp32


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[7], [9, 9, 9], [5, 1, 17, 8], [1, 1, 1]], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, dict(num_key_value_heads=2)], ids=["multi-head", "grouped-query"]
)
def test_packed_samples_match_transformers_one_at_a_time(
    tmp_path: Path, lengths: list[int], settings: dict
) -> None:
    hf_model, model = both_models(tmp_path, **settings)
    input_ids = random_ids(sum(lengths))
    expected = torch.cat([hf_model(sample[None]).logits[0] for sample in input_ids.split(lengths)])
    torch.testing.assert_close(model(input_ids, lengths), expected, atol=1e-4, rtol=0)  # fp32


def hf_loss(
    hf_model: PreTrainedModel,
    input_ids: Tensor,
    lengths: list[int],
    positions: Tensor,
    labels: Tensor,
):
    """Cross entropy over the labels by `transformers`, one sample at a time."""
    logits = torch.cat([hf_model(sample[None]).logits[0] for sample in input_ids.split(lengths)])
    return F.cross_entropy(logits[positions], labels, reduction="sum")


@pytest.mark.parametrize("chunk", [None, 4, 11, 256], ids=["plain", "4", "11", "256"])
def test_loss_matches_cross_entropy_of_transformers(
    tmp_path: Path, monkeypatch, chunk: int | None
) -> None:
    hf_model, model = both_models(tmp_path)
    if chunk is not None:
        monkeypatch.setattr(modules.FastLLaMA, "loss_chunk", chunk)
        use_fast_paths(model)
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
    loss = model(input_ids, label_positions=positions, labels=labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # fp32


@pytest.mark.parametrize("lengths", [[12, 12], [6, 13, 5]], ids=["uniform", "ragged"])
@pytest.mark.parametrize(
    "settings",
    [dict(num_key_value_heads=2, attention_bias=True), dict(tie_word_embeddings=True)],
    ids=["grouped-query", "tied head"],
)
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_gradients_of_all_weights_match_transformers(
    tmp_path: Path, monkeypatch, settings: dict, lengths: list[int], fast: bool
) -> None:
    monkeypatch.setattr(modules.FastLLaMA, "loss_chunk", 7)
    hf_model, model = both_models(tmp_path, **settings)
    if fast:
        use_fast_paths(model)
    model.requires_grad_(True).train()
    input_ids, positions = random_ids(24), torch.arange(2, 23)
    labels = random_ids(len(positions), seed=2)
    hf_loss(hf_model, input_ids, lengths, positions, labels).backward()
    model(input_ids, lengths, positions, labels).backward()
    expected = {n.removeprefix("model."): p.grad for n, p in hf_model.named_parameters()}
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        # fp32 through two layers, forward and backward
        assert relative_difference(actual[name], gradient) < 1e-4, name


def test_only_weights_live_on_the_model(tmp_path: Path) -> None:
    """A model on the meta device needs nothing else to run; names are those of `transformers`."""
    hf_model, model = both_models(tmp_path)
    assert not list(model.buffers())
    names = {name.removeprefix("model.") for name in hf_model.state_dict()}
    assert names == set(model.state_dict())


def inputs(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, 64), (tokens, kv_heads, 64), (tokens, kv_heads, 64)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def dense(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """One SDPA over all tokens with the block-diagonal causal mask, which we never make."""
    mask = torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool().to(query.device)
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return attended[0].transpose(0, 1)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[40], [10, 10, 10], [3, 25, 1, 11]], ids=str)
def test_packed_attention_matches_sdpa_under_dense_mask(lengths: list[int], kv_heads: int) -> None:
    q, k, v = inputs(sum(lengths), 4, kv_heads, torch.float32, "cpu")
    expected = dense(q, k, v, lengths)
    actual = causal_attention(q, k, v, PackedSequences(lengths, q.device))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)  # fp32
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (actual, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)  # fp32, sums of up to 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("lengths", [[512], [128, 128], [300, 17, 1, 511]], ids=str)
def test_varlen_kernel_matches_fp32_sdpa_under_dense_mask(
    lengths: list[int], kv_heads: int
) -> None:
    q, k, v = inputs(sum(lengths), 4, kv_heads, torch.bfloat16, "cuda")
    expected = dense(q.float(), k.float(), v.float(), lengths)
    actual = causal_attention(q, k, v, PackedSequences(lengths, q.device))
    # bf16: 8 bits, 0.4% a rounding
    assert (actual.float() - expected).norm() < 1e-2 * expected.norm()
    weights = torch.randn_like(expected)
    sums = [(y.float() * weights).sum() for y in (actual, expected)]
    gradients = [torch.autograd.grad(total, (q, k, v)) for total in sums]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours.float() - theirs.float()).norm() < 2e-2 * theirs.float().norm()


def test_packed_sequences_know_where_samples_start() -> None:
    seqs = PackedSequences([3, 1, 2], torch.device("cpu"))
    assert seqs.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert seqs.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert seqs.max_length == 3


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
        greedy = dict(do_sample=False, eos_token_id=-1)
        expected = hf_model.generate(input_ids, min_new_tokens=64, max_new_tokens=64, **greedy)
        assert generate(model, input_ids, 64, temperature=0).tolist() == expected.tolist()
