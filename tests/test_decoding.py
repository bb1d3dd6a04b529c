"""Each fast way of decoding against the plain one, and batches and speculation against one prompt after the other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_script, make_hf_model

from lit_llama import UserError, fast, load_model
from lit_llama.decoding import DecodeStep, FusedAttention, PackedLinear, can_pack, prepare
from lit_llama.generation import Sampling, decode, generate, probabilities, read_late, speculate, stream

CPU = torch.device("cpu")
PROMPTS = [torch.randint(3, 384, (size,), generator=torch.Generator().manual_seed(size)) for size in (12, 1, 5, 30)]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "biases-tied"])
def folder(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    more = dict(attention_bias=True, tie_word_embeddings=True) if request.param else {}
    make_hf_model(num_key_value_heads=2, **more).save_pretrained(path)
    return path


def logits_of(model, tokens: torch.Tensor, static: bool = False) -> torch.Tensor:
    """Of each token from the sixth on, one step at a time."""
    cache = model.make_kv_cache(1, len(tokens), static)
    parts = [model(tokens[None, :5], kv_cache=cache)[:, -1]]
    step = DecodeStep(model, cache)
    parts += [step(token[None]).clone() for token in tokens[5:-1]]
    return torch.cat(parts)


@torch.inference_mode()
@pytest.mark.parametrize("static", [False, True])
def test_fused_projections_and_static_steps_give_the_plain_logits(folder: Path, static: bool) -> None:
    plain, fused = (load_model(folder, dtype=torch.float32) for _ in range(2))
    prepare(fused, CPU)
    assert type(fused.layers[0].self_attn) is FusedAttention
    expected = plain(PROMPTS[3][None])[0, 4:-1]
    torch.testing.assert_close(logits_of(plain, PROMPTS[3]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits_of(fused, PROMPTS[3], static), expected, atol=1e-5, rtol=0)  # fp32
    actual = generate(fused, PROMPTS[0], 20, temperature=0)
    assert actual.tolist() == generate(plain, PROMPTS[0], 20, temperature=0).tolist()


@torch.inference_mode()
@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this CPU has no bf16 kernels")
def test_packed_layers_give_the_plain_logits(folder: Path) -> None:
    plain, packed = (load_model(folder) for _ in range(2))
    prepare(packed, CPU)
    assert type(packed.layers[0].mlp.gate_up_proj) is type(packed.lm_head) is PackedLinear
    torch.testing.assert_close(logits_of(packed, PROMPTS[3]), logits_of(plain, PROMPTS[3]), atol=0.02, rtol=0)  # bf16


def test_slow_paths_are_one_flag_away(tiny_checkpoint: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(fast, "enabled", True)
    prepared = []
    monkeypatch.setattr("lit_llama.generation.prepare", lambda *args: prepared.append(args))
    for fast_paths in (True, False):
        load_script("generate/base.py").main(
            checkpoint_dir=tiny_checkpoint, prompt="Hi", max_new_tokens=3, fast_paths=fast_paths, precision="32-true"
        )
        assert prepared[-1][3] is fast.enabled is fast_paths


@torch.inference_mode()
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_step_gives_the_plain_tokens(tmp_path: Path) -> None:
    make_hf_model(num_key_value_heads=2, num_hidden_layers=2).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    prepare(model, CPU, compile=True)
    tokens = list(stream(model, PROMPTS[:2], Sampling(6, temperature=0), compile=True))
    expected = list(stream(model, PROMPTS[:2], Sampling(6, temperature=0)))
    assert torch.stack(tokens).tolist() == torch.stack(expected).tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU Triton compiles")
def test_compiling_without_a_compiler_is_refused(tiny_checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"--compile: needs a C\+\+ compiler"):
        load_script("generate/base.py").main(checkpoint_dir=tiny_checkpoint, prompt="Hi", compile=True)


def test_prompts_of_other_lengths_do_not_change_a_row(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32)
    together = generate(model, PROMPTS, 20, temperature=0)
    for prompt, actual in zip(PROMPTS, together, strict=True):
        assert actual.tolist() == generate(model, prompt, 20, temperature=0).tolist()
    ends = [int(together[0][12 + 4])]
    for prompt, actual in zip(PROMPTS, generate(model, PROMPTS, 20, temperature=0, eos_id=ends), strict=True):
        alone = generate(model, prompt, 20, temperature=0, eos_id=ends)
        assert actual.tolist()[: len(alone)] == alone.tolist()
        assert set(actual.tolist()[len(alone) :]) <= set(ends)


def test_a_file_of_prompts_is_answered_as_one_after_the_other(tmp_path: Path, tiny_checkpoint: Path, capsys) -> None:
    base = load_script("generate/base.py").main
    settings = dict(checkpoint_dir=tiny_checkpoint, max_new_tokens=8, temperature=0.0, precision="32-true")
    prompts = ["Hello", "Name three: a, b, \N{LLAMA}", "1 + 1 ="]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts) + "\n", "utf-8")
    base(prompt_file=tmp_path / "prompts.txt", batch_size=2, **settings)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    for line in lines:
        base(prompt=line["prompt"], **settings)
        assert capsys.readouterr().out == line["answer"] + "\n"
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="holds no prompt"):
        base(prompt_file=tmp_path / "empty.txt", **settings)
    with pytest.raises(UserError, match=r"latin.txt: not UTF-8 \(byte 3\)"):
        base(prompt_file=tmp_path / "latin.txt", **settings)
    with pytest.raises(UserError, match="give one of them"):
        base(**settings)


@pytest.mark.parametrize("seed", [0, 7])
def test_speculation_gives_the_greedy_tokens(folder: Path, tmp_path: Path, seed: int) -> None:
    """Whatever the draft says: one of its own, and the model itself."""
    model = load_model(folder, dtype=torch.float32)
    make_hf_model(num_hidden_layers=1, seed=seed).save_pretrained(tmp_path)
    draft = load_model(tmp_path, dtype=torch.float32)
    for new in (0, 1, 2, 25):
        expected = [int(token) for token in decode(model, PROMPTS[:1], Sampling(new, temperature=0))]
        for which in (draft, model):
            actual = [int(token) for token in speculate(model, which, PROMPTS[:1], Sampling(new, temperature=0))]
            assert actual == expected
    with pytest.raises(UserError, match="for one prompt"):
        list(speculate(model, draft, PROMPTS[:2], Sampling(3)))


class Bigrams(torch.nn.Module):
    """A model whose logits depend on the token before only, so that the distribution is known."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__()
        model = load_model(folder, dtype=torch.float32)
        self.config, self.embed_tokens, self.make_kv_cache = model.config, model.embed_tokens, model.make_kv_cache
        self.table = 2 * torch.randn(384, 4, generator=torch.Generator().manual_seed(seed))

    def forward(self, input_ids: torch.Tensor, kv_cache) -> torch.Tensor:
        kv_cache.longest += input_ids.size(1)
        logits = torch.full((*input_ids.shape, 384), -torch.inf)
        logits[..., :4] = self.table[input_ids]
        return logits


def test_speculation_leaves_the_distribution_as_it_is(folder: Path) -> None:
    model, draft = Bigrams(folder, 1), Bigrams(folder, 2)
    counts, tries = torch.zeros(4, 4, 4), 3000
    for seed in range(tries):
        counts[tuple(int(t) for t in speculate(model, draft, [torch.tensor([9])], Sampling(3, 0.9, seed=seed)))] += 1
    rows = probabilities(model.table, Sampling(1, 0.9))
    expected = rows[9][:, None, None] * rows[:4][:, :, None] * rows[:4][None]
    deviation = (expected * (1 - expected) / tries).sqrt()
    assert ((counts / tries - expected).abs() <= 4.5 * deviation + 1e-9).all()


def test_tokens_are_read_in_order() -> None:
    assert [int(token) for token in read_late(iter(torch.arange(5)[:, None]))] == list(range(5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
@pytest.mark.parametrize("compile", [False, True])
def test_a_recorded_step_gives_the_plain_tokens(folder: Path, compile: bool) -> None:
    model = load_model(folder, "cuda", torch.float32)
    actual = [t.tolist() for t in stream(model, PROMPTS, Sampling(20, temperature=0), compile=compile)]
    model = load_model(folder, dtype=torch.float32)
    assert actual == [t.tolist() for t in stream(model, PROMPTS, Sampling(20, temperature=0))]
