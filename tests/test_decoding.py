"""Optimized decoding against the plain model; batches and speculation against single prompts."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch._dynamo
from conftest import load_script, make_hf_model

from lit_llama import LLaMA, UserError, load_model
from lit_llama.fast import decoding
from lit_llama.fast.decoding import (
    FusedAttention,
    OneTokenRMSNorm,
    StaticLLaMA,
    copy_to_cpu_async,
    optimize_for_inference,
)
from lit_llama.fast.packing import PackedLinear, can_pack
from lit_llama.fast.speculation import speculate
from lit_llama.generation import (
    Sampling,
    decode,
    generate,
    probabilities,
    stream,
)
from lit_llama.model import RMSNorm
from lit_llama.runtime.memory import Counter

CPU = torch.device("cpu")


def random_prompt(length: int) -> torch.Tensor:
    return torch.randint(3, 384, (length,), generator=torch.Generator().manual_seed(length))


PROMPTS = [random_prompt(length) for length in (12, 1, 5, 30)]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "biases-tied"])
def folder(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    more = dict(attention_bias=True, tie_word_embeddings=True) if request.param else {}
    make_hf_model(num_key_value_heads=2, **more).save_pretrained(path)
    return path


def logits_of(model: LLaMA, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits after each token from the fifth on, decoded step by step."""
    cache = model.make_kv_cache(1, len(tokens))
    parts = [model(tokens[None, :5], kv_cache=cache)[:, -1]]
    parts += [model(token[None, None], kv_cache=cache)[:, -1].clone() for token in tokens[5:-1]]
    return torch.cat(parts)


@torch.inference_mode()
@pytest.mark.parametrize("static", [False, True])
def test_fused_projections_and_static_steps_give_the_plain_logits(
    folder: Path, static: bool
) -> None:
    plain, fused = (load_model(folder, dtype=torch.float32) for _ in range(2))
    optimize_for_inference(fused, CPU)
    assert type(fused.layers[0].self_attn) is FusedAttention
    if static:  # as on a GPU, but not recorded
        fused.__class__ = StaticLLaMA
    expected = plain(PROMPTS[3][None])[0, 4:-1]
    torch.testing.assert_close(logits_of(plain, PROMPTS[3]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits_of(fused, PROMPTS[3]), expected, atol=1e-5, rtol=0)  # fp32
    texts = [generate(model, PROMPTS, 20, temperature=0) for model in (fused, plain)]
    assert all(map(torch.equal, *texts))


@torch.inference_mode()
@pytest.mark.parametrize("new_tokens", [1, 6])
def test_a_static_cache_goes_on_with_the_next_turn(folder: Path, new_tokens: int) -> None:
    """As a chat does: decode, drop some tokens, and continue with a packed prompt."""
    answers = []
    for static in (False, True):
        model = load_model(folder, dtype=torch.float32)
        if static:  # as on a GPU, but not recorded
            model.__class__ = StaticLLaMA
        cache = model.make_kv_cache(1, 60)
        sampling = Sampling(10, temperature=0)
        first = [int(token) for token in decode(model, PROMPTS[:1], sampling, cache)]
        cache.truncate([15])  # the prompt of 12 tokens and 3 of the answer
        ids = [*PROMPTS[0].tolist(), *first[:3], *random_prompt(new_tokens).tolist()]
        prompt = torch.tensor(ids)
        second = [int(token) for token in decode(model, [prompt], sampling, cache)]
        answers.append((first, second))
        assert second == generate(model, prompt, 10, temperature=0)[len(ids) :].tolist()
    assert answers[0] == answers[1]


def static_model(folder: Path) -> StaticLLaMA:
    """As on a GPU, but not recorded."""
    model = load_model(folder, dtype=torch.float32)
    model.__class__ = StaticLLaMA
    return model


def test_a_static_cache_is_kept_for_answers_of_about_that_length(folder: Path) -> None:
    plain, static = load_model(folder, dtype=torch.float32), static_model(folder)
    steps = []
    for prompt, new in ((PROMPTS[3], 20), (PROMPTS[0], 22), (PROMPTS[0], 8), (PROMPTS[3], 20)):
        answers = [generate(model, prompt, new, temperature=0) for model in (plain, static)]
        assert torch.equal(*answers)
        steps.append(static.step)
    assert steps[0].kv_cache.size == (1, 64)  # 50 and 34 tokens, rounded up
    assert steps[0] is steps[1]
    assert steps[2].kv_cache.size == (1, 32)
    assert steps[2] is not steps[1]


def test_answers_that_are_decoded_in_turns_do_not_share_a_cache(folder: Path) -> None:
    plain, static = load_model(folder, dtype=torch.float32), static_model(folder)
    sampling = Sampling(12, temperature=0)
    decoded = [decode(static, [prompt], sampling) for prompt in (PROMPTS[0], PROMPTS[2])]
    turns = [[int(token) for token in pair] for pair in zip(*decoded, strict=True)]
    for prompt, tokens in zip((PROMPTS[0], PROMPTS[2]), zip(*turns, strict=True), strict=True):
        expected = generate(plain, prompt, 12, temperature=0)[len(prompt) :]
        assert list(tokens) == expected.tolist()


def test_a_static_cache_counts_what_is_decoded(folder: Path) -> None:
    """So that a prompt may continue it without `truncate`, in and outside of inference mode."""
    static, plain = static_model(folder), load_model(folder, dtype=torch.float32)
    generate(static, PROMPTS[0], 15, temperature=0)  # makes the cache that is lent again
    sampling, answers = Sampling(5, temperature=0), []
    for model in (static, plain):
        cache = model.make_kv_cache(1, 32)
        first = [int(token) for token in decode(model, [PROMPTS[2]], sampling, cache)]
        longer = torch.tensor([*PROMPTS[2].tolist(), *first, 7, 8])
        second = [int(token) for token in decode(model, [longer], sampling, cache)]
        answers.append((first, second, cache.length, cache.lengths.tolist()))
        cache.truncate([3])
    assert answers[0] == answers[1]


def test_a_step_and_its_cache_are_freed_before_the_next_ones(folder: Path) -> None:
    model = static_model(folder)
    generate(model, PROMPTS[0], 15)
    step = weakref.ref(model.step)
    gc.disable()
    try:
        generate(model, PROMPTS[0], 40)
        assert step() is None
    finally:
        gc.enable()


@torch._dynamo.config.patch(recompile_limit=8)
def test_compiled_decoding_of_any_number_of_lengths(folder: Path, monkeypatch) -> None:
    """More sizes than torch.compile compiles of one function."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kw: compile(*args, backend="eager", **kw))
    plain, compiled = (load_model(folder, dtype=torch.float32) for _ in range(2))
    optimize_for_inference(compiled, CPU, compile=True)
    sizes = set()
    for rows in (1, 2, 3):
        for new in (4, 20, 50, 100):
            prompts = [PROMPTS[0]] * rows
            answers = [generate(model, prompts, new, temperature=0) for model in (plain, compiled)]
            assert all(map(torch.equal, *answers))
            sizes.add(compiled.step.kv_cache.size)
    assert len(sizes) == 12


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_few_weights_exist_twice_while_they_are_optimized(
    tmp_path: Path, quantize: str | None
) -> None:
    make_hf_model(num_hidden_layers=12, hidden_size=128).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    weights = sum(p.nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in model.layers[0].parameters())
    with Counter() as counter:
        optimize_for_inference(model, CPU, quantize)
    # what is made here: fused or quantized weights; of a layer, also what its quantization needs
    assert counter.peak < weights + 3 * layer + 4 * model.embed_tokens.weight.nbytes
    assert counter.live <= weights


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
@torch.inference_mode()
def test_packed_layers_give_the_plain_logits(
    folder: Path, dtype: torch.dtype, tolerance: float
) -> None:
    plain, packed = (load_model(folder, dtype=dtype) for _ in range(2))
    if not can_pack(dtype):
        pytest.skip("oneDNN has no such kernels here")
    optimize_for_inference(packed, CPU)
    assert type(packed.layers[0].mlp.gate_up_proj) is type(packed.lm_head) is PackedLinear
    actual, expected = logits_of(packed, PROMPTS[3]), logits_of(plain, PROMPTS[3])
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_the_norm_of_one_token_is_that_of_torch(dtype: torch.dtype) -> None:
    plain, fast = RMSNorm(96, 1e-5), OneTokenRMSNorm(96, 1e-5)
    for norm in (plain, fast):
        norm.weight.copy_(torch.linspace(-2, 2, 96))
        norm.to(dtype)
    for size in (1e-4, 1, 100):
        x = (torch.randn(1, 96, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
        tolerance = dict(atol=0.02, rtol=0.01) if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(fast(x), plain(x), **tolerance)
        assert fast(x).dtype == dtype


@torch.inference_mode()
def test_fast_paths_false_leaves_the_plain_modules(tiny_checkpoint: Path, monkeypatch) -> None:
    plain = load_model(tiny_checkpoint)
    classes = [type(module) for module in plain.modules()]
    optimize_for_inference(plain, CPU, None, False)
    assert [type(module) for module in plain.modules()] == classes
    optimize, base = Mock(), load_script("generate/base.py")
    monkeypatch.setattr(decoding, "optimize_for_inference", optimize)
    for fast_paths in (True, False):
        args = base.AnswerArgs("Hi", max_new_tokens=3, fast_paths=fast_paths)
        base.main(args, tiny_checkpoint)
        assert optimize.call_args.args[3] is fast_paths


@torch.inference_mode()
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_compiled_step_gives_the_plain_tokens(tmp_path: Path, quantize: str | None) -> None:
    sizes = dict(num_key_value_heads=2, num_hidden_layers=1)
    make_hf_model(**sizes, intermediate_size=72).save_pretrained(tmp_path)
    plain, compiled = (load_model(tmp_path, dtype=torch.float32) for _ in range(2))
    optimize_for_inference(plain, CPU, quantize, fast_paths=False)
    optimize_for_inference(compiled, CPU, quantize, compile=True)
    expected, actual = (generate(m, PROMPTS[:2], 6, temperature=0) for m in (plain, compiled))
    assert all(map(torch.equal, actual, expected))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU Triton compiles")
def test_compiling_without_a_compiler_is_refused(tiny_checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    base = load_script("generate/base.py")
    with pytest.raises(UserError, match=r"--compile: needs a C\+\+ compiler"):
        base.main(base.AnswerArgs("Hi", compile=True), tiny_checkpoint)


def test_prompts_of_other_lengths_do_not_change_a_row(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32)
    together = generate(model, PROMPTS, 20, temperature=0)
    for prompt, actual in zip(PROMPTS, together, strict=True):
        assert actual.tolist() == generate(model, prompt, 20, temperature=0).tolist()
    ends = [int(together[0][12 + 4])]
    together = generate(model, PROMPTS, 20, temperature=0, eos_id=ends)
    for prompt, actual in zip(PROMPTS, together, strict=True):
        alone = generate(model, prompt, 20, temperature=0, eos_id=ends)
        assert actual.tolist()[: len(alone)] == alone.tolist()
        assert set(actual.tolist()[len(alone) :]) <= set(ends)


def test_a_file_of_prompts_gives_the_answers_to_single_prompts(
    tmp_path: Path, tiny_checkpoint: Path, capsys
) -> None:
    base, file = load_script("generate/base.py"), tmp_path / "prompts.txt"

    def run(prompt: str | None = None, **settings) -> str:
        args = base.AnswerArgs(prompt, max_new_tokens=8, temperature=0.0, **settings)
        base.main(args, tiny_checkpoint, precision="32-true")
        return capsys.readouterr().out

    prompts = ["Hello", "Name three: a, b, \N{LLAMA}", "1 + 1 ="]
    file.write_text("\n\n".join(prompts) + "\n", "utf-8")
    lines = list(map(json.loads, run(prompt_file=file, batch_size=2).splitlines()))
    assert [line["prompt"] for line in lines] == prompts
    for line in lines:
        assert run(line["prompt"]) == line["answer"] + "\n"
    file.write_text(" \n")
    with pytest.raises(UserError, match="holds no prompt"):
        run(prompt_file=file)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"prompts.txt: not UTF-8 \(byte 3\)"):
        run(prompt_file=file)
    with pytest.raises(UserError, match="give one of them"):
        run()


@pytest.mark.parametrize("seed", [0, 7])
def test_speculation_gives_the_greedy_tokens(folder: Path, tmp_path: Path, seed: int) -> None:
    """With a draft of other weights, and with the model itself as the draft."""
    model = load_model(folder, dtype=torch.float32)
    make_hf_model(num_hidden_layers=1, seed=seed).save_pretrained(tmp_path)
    draft = load_model(tmp_path, dtype=torch.float32)
    for new in (0, 1, 2, 25):
        prompts, sampling = PROMPTS[:1], Sampling(new, temperature=0)
        expected = [int(token) for token in decode(model, prompts, sampling)]
        for other in (draft, model):
            assert [int(token) for token in speculate(model, prompts, sampling, other)] == expected
    with pytest.raises(UserError, match="for one prompt"):
        list(speculate(model, PROMPTS[:2], Sampling(3), draft))


class Bigrams(torch.nn.Module):
    """A model whose logits depend on the last token only, so that the distribution is known."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__()
        model = load_model(folder, dtype=torch.float32)
        self.config, self.embed_tokens = model.config, model.embed_tokens
        self.table = 2 * torch.randn(384, 4, generator=torch.Generator().manual_seed(seed))

    def forward(self, input_ids: torch.Tensor, kv_cache) -> torch.Tensor:
        kv_cache.length += input_ids.size(1)
        logits = torch.full((*input_ids.shape, 384), -torch.inf)
        logits[..., :4] = self.table[input_ids]
        return logits


def test_speculation_does_not_change_the_distribution(folder: Path) -> None:
    model, draft = Bigrams(folder, 1), Bigrams(folder, 2)
    counts, tries = torch.zeros(4, 4, 4), 3000
    for seed in range(tries):
        tokens = speculate(model, [torch.tensor([9])], Sampling(3, 0.9, seed=seed), draft)
        counts[tuple(int(token) for token in tokens)] += 1
    rows = probabilities(model.table, Sampling(1, 0.9))
    expected = rows[9][:, None, None] * rows[:4][:, :, None] * rows[:4][None]
    deviation = (expected * (1 - expected) / tries).sqrt()
    assert ((counts / tries - expected).abs() <= 4.5 * deviation + 1e-9).all()


def test_tokens_are_copied_in_order_each_after_the_next_has_started(monkeypatch) -> None:
    stream, started = Mock(), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    tokens = (started.append(token) or token for token in torch.arange(5)[:, None])
    copied = [(int(token), len(started)) for token in copy_to_cpu_async(tokens)]
    assert copied == [(0, 2), (1, 3), (2, 4), (3, 5), (4, 5)]
    assert stream.record_event().synchronize.call_count == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
@pytest.mark.parametrize("compile", [False, True])
def test_a_recorded_step_gives_the_plain_tokens(folder: Path, compile: bool) -> None:
    tokens = []
    for device in ("cuda", "cpu"):
        model = load_model(folder, device, torch.float32)
        if device == "cuda":
            optimize_for_inference(model, torch.device(device), compile=compile)
        steps = stream(model, PROMPTS, Sampling(20, temperature=0))
        tokens.append([step.tolist() for step in steps])
    assert tokens[0] == tokens[1]
