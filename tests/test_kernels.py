"""Kernels of a GPU: traced by torch.compile they compute what they compute as they are written."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_llama.fast import kernels
from lit_llama.fast.quantization import Int8Linear, NF4Linear


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(tokens: int) -> dict[str, tuple]:
    """Return arguments of each kernel, for that many tokens."""
    x, y, weight = normal(tokens, 64), normal(tokens, 64, seed=1), normal(64, seed=2)
    wide = [normal(tokens, 96, seed=seed) for seed in range(3)]
    rope = (normal(tokens, 4, 16), normal(tokens, 1, 16, seed=1), normal(tokens, 1, 16, seed=2))
    masks = (normal(100, 64) > 0, torch.arange(tokens) % 7)
    matrix = normal(96, 64)
    nf4, int8 = NF4Linear(matrix), Int8Linear(matrix)
    return {
        "rope": rope,
        "rope_backward": rope,
        "rms_norm": (x, weight, 1e-5),
        "rms_norm_backward": (y, x, weight, 1e-5, True),
        "swiglu": (wide[0], wide[1]),
        "swiglu_backward": tuple(wide),
        "masked": (x, *masks),
        "masked_both": (x, y, *masks),
        "dequantize_nf4": (nf4.nf4, nf4.absmax, nf4.pairs),
        "to_fp8": (x, weight),
        "int8_matmul": (x[: tokens // 4], int8.int8, int8.scale),
    }


def results(function: Any, args: tuple) -> list[Tensor]:
    """Call a function on copies. Returns its results in fp32."""
    found = function(*(x.clone() if isinstance(x, Tensor) else x for x in args))
    return [tensor.float() for tensor in (found if isinstance(found, tuple) else [found])]


@pytest.mark.parametrize("name", arguments(4))
def test_a_compiled_kernel_computes_the_same(name: str) -> None:
    """Without a graph break, for several numbers of tokens."""
    plain = getattr(kernels, name).__wrapped__
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    for tokens in (12, 20, 8):
        args = arguments(tokens)[name]
        pairs = zip(results(compiled, args), results(plain, args), strict=True)
        for actual, expected in pairs:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # fp32


def test_rope_on_a_gpu_equals_that_of_the_book() -> None:
    x, cos, sin = arguments(20)["rope"]
    for dtype in (torch.float32, torch.bfloat16):
        plain = kernels.rope.__wrapped__
        on_meta = plain(x.to("meta", dtype), cos.to("meta"), sin.to("meta"))
        assert on_meta.dtype == dtype
        x_dtype = x.to(dtype)
        # what the function does on any device but the CPU
        without_copy = torch.addcmul(x_dtype * cos, x_dtype.roll(8, dims=-1), sin).to(dtype)
        assert torch.equal(without_copy, plain(x_dtype, cos, sin))


def test_a_kernel_that_cannot_be_compiled_runs_as_it_is_written(monkeypatch, capsys) -> None:
    def fail(error: Exception, function: object) -> object:
        def call(*args: object) -> object:
            raise error

        return call

    x = torch.ones(3)
    monkeypatch.setattr(kernels, "runs_compiled", lambda device: kernels.COMPILE)
    monkeypatch.setattr(kernels, "COMPILE", True)
    monkeypatch.setattr(torch, "compile", partial(fail, RuntimeError("no Triton here\nat all")))
    double = kernels.kernel(lambda x: 2 * x)
    assert [double(x).tolist() for _ in range(2)] == [[2, 2, 2]] * 2
    message = "torch.compile of <lambda> does not work here, a slower kernel is used"
    assert capsys.readouterr().err == f"{message}: no Triton here\n"  # once

    wrapped = RuntimeError("backend raised")
    wrapped.inner_exception = torch.OutOfMemoryError("full")
    monkeypatch.setattr(torch, "compile", partial(fail, wrapped))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        kernels.kernel(lambda x: 2 * x)(x)
    monkeypatch.setattr(torch, "compile", partial(fail, torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        kernels.kernel(lambda x: 2 * x)(x)


def test_a_compiler_is_looked_for(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels.c_compiler() is None
    (tmp_path / "clang").touch(mode=0o755)
    assert kernels.c_compiler() == str(tmp_path / "clang")
    monkeypatch.setenv("CC", "missing")
    assert kernels.c_compiler() is None
