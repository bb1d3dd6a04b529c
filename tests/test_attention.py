"""Attention over samples laid end to end against torch's SDPA under a dense mask."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.attention import SampleLengths, causal_attention


def inputs(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, 64), (tokens, kv_heads, 64), (tokens, kv_heads, 64)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def dense(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """One SDPA over all tokens with the block-diagonal causal mask, which the product never makes."""
    mask = torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool().to(query.device)
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[40], [10, 10, 10], [3, 25, 1, 11]], ids=str)
def test_matches_sdpa_under_dense_mask(lengths: list[int], kv_heads: int) -> None:
    q, k, v = inputs(sum(lengths), 4, kv_heads, torch.float32, "cpu")
    expected = dense(q, k, v, lengths)
    actual = causal_attention(q, k, v, SampleLengths(lengths, q.device))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)  # fp32
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (actual, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)  # fp32, sums of up to 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("lengths", [[512], [128, 128], [300, 17, 1, 511]], ids=str)
def test_varlen_kernel_matches_fp32_sdpa_under_dense_mask(lengths: list[int], kv_heads: int) -> None:
    q, k, v = inputs(sum(lengths), 4, kv_heads, torch.bfloat16, "cuda")
    expected = dense(q.float(), k.float(), v.float(), lengths)
    actual = causal_attention(q, k, v, SampleLengths(lengths, q.device))
    # bf16: 8 bits, 0.4% a rounding
    assert (actual.float() - expected).norm() < 1e-2 * expected.norm()
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y.float() * weights).sum(), (q, k, v)) for y in (actual, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours.float() - theirs.float()).norm() < 2e-2 * theirs.float().norm()


def test_sample_lengths_say_where_samples_start() -> None:
    samples = SampleLengths([3, 1, 2], torch.device("cpu"))
    assert samples.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert samples.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert samples.longest == 3
