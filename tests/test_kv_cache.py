"""Decoding with the KV cache against `transformers` without one."""

from pathlib import Path

import pytest
import torch
from test_model import both_models, random_ids
from torch import Tensor
from transformers import PreTrainedModel

from lit_llama import LLaMA


@torch.no_grad()
def greedy_without_cache(model: PreTrainedModel, input_ids: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        token = model(input_ids).logits[:, -1:].argmax(-1)
        input_ids = torch.cat((input_ids, token), dim=1)
    return input_ids


@torch.no_grad()
def greedy_with_cache(
    model: LLaMA, input_ids: Tensor, steps: int, chunk: int | None = None
) -> Tensor:
    """Decode greedily after a prefill in chunks of `chunk` tokens."""
    kv_cache = model.make_kv_cache(len(input_ids), input_ids.size(1) + steps)
    for part in input_ids.split(chunk or input_ids.size(1), dim=1):
        logits = model(part, kv_cache=kv_cache)
    for _ in range(steps):
        token = logits[:, -1:].argmax(-1)
        input_ids = torch.cat((input_ids, token), dim=1)
        logits = model(token, kv_cache=kv_cache)
    assert kv_cache.length == input_ids.size(1)
    return input_ids


@pytest.fixture(scope="module")
def decoding_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, LLaMA]:
    return both_models(tmp_path_factory.mktemp("model"), num_key_value_heads=2)


@pytest.mark.parametrize("prefill", range(1, 21))
def test_greedy_with_kv_cache_matches_transformers_without(decoding_pair, prefill: int) -> None:
    hf_model, model = decoding_pair
    input_ids = random_ids(1, prefill)
    expected = greedy_without_cache(hf_model, input_ids, 12)
    assert greedy_with_cache(model, input_ids, 12).tolist() == expected.tolist()


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
    assert kv_cache.length == 5
    torch.testing.assert_close(kv_cache.keys, before, atol=0, rtol=0)
    model(random_ids(1, 1), kv_cache=kv_cache)  # one position is still free


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_cache_has_the_models_dtype_and_only_key_value_heads(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    hf_model, model = both_models(tmp_path, dtype=dtype, num_key_value_heads=2)
    kv_cache = model.make_kv_cache(3, 17)
    expected = hf_model(random_ids(3, 17), use_cache=True).past_key_values.layers
    for ours, theirs in ((kv_cache.keys, "keys"), (kv_cache.values, "values")):
        assert ours.dtype == dtype
        assert len(ours) == len(expected)
        assert ours[0].shape == getattr(expected[0], theirs).shape
    assert kv_cache.length == 0
    assert kv_cache.keys.shape[3] == 17
