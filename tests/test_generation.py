"""Decoding against `transformers`: greedy, sampling, stop tokens; streamed text; the scripts."""

import json
from pathlib import Path

import pytest
import torch
from answering import AnswerArgs, stream_text
from conftest import load_script, make_hf_model
from transformers import AutoModelForCausalLM
from transformers.generation import logits_process

from lit_llama import Tokenizer, UserError, load_model
from lit_llama.fast.decoding import copy_to_cpu_async
from lit_llama.generation import Sampling, generate, sample
from lit_llama.lora import LoRAConfig, apply_lora, save_lora
from lit_llama.runtime import cli

INPUT_IDS = torch.randint(3, 384, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model")
    hf_model = make_hf_model(num_key_value_heads=2)
    hf_model.save_pretrained(folder)
    return hf_model, load_model(folder, dtype=torch.float32)


def test_greedy_matches_transformers(pair) -> None:
    hf_model, model = pair
    expected = hf_model.generate(INPUT_IDS, do_sample=False, max_new_tokens=20, eos_token_id=-1)
    assert generate(model, INPUT_IDS, 20, temperature=0).tolist() == expected.tolist()
    assert generate(model, INPUT_IDS[1], 20, temperature=0).tolist() == expected[1].tolist()


def test_rows_end_like_those_of_transformers(pair) -> None:
    hf_model, model = pair
    free = generate(model, INPUT_IDS, 20, temperature=0)[:, 12:]
    ends = [
        int(free[0, 3]),
        int(free[1, 8]),
    ]  # each row meets one of them at another place, or none
    settings = dict(do_sample=False, max_new_tokens=20, eos_token_id=ends, pad_token_id=ends[0])
    expected = hf_model.generate(INPUT_IDS, **settings)
    assert generate(model, INPUT_IDS, 20, temperature=0, eos_id=ends).tolist() == expected.tolist()
    alone = generate(model, INPUT_IDS[0], 20, temperature=0, eos_id=ends[0])
    assert len(alone) == 12 + 1 + free[0].tolist().index(ends[0])


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("top_k", [None, 1, 5, 10**6])
@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_probabilities_are_those_of_transformers(
    monkeypatch, temperature: float, top_k: int | None, top_p: float
) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2)) * 3
    expected = logits_process.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        expected = logits_process.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = logits_process.TopPLogitsWarper(top_p)(None, expected)
    drawn_from = []

    def multinomial(probabilities, count, generator):
        drawn_from.append(probabilities)
        return probabilities.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    sample(logits, Sampling(1, temperature, top_k, top_p))
    actual = drawn_from[0] / drawn_from[0].sum(-1, keepdim=True)
    torch.testing.assert_close(actual, expected.softmax(-1), atol=1e-5, rtol=0)  # fp32


def test_seed_decides(pair) -> None:
    _, model = pair
    texts = [
        generate(model, INPUT_IDS, 20, temperature=1.5, seed=seed).tolist() for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    state = torch.get_rng_state()
    generate(model, INPUT_IDS, 2, temperature=1.5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().repeat(20_000, 1)
    counts = sample(logits, Sampling(1), torch.Generator().manual_seed(0)).bincount()
    # a standard deviation of 0.003
    torch.testing.assert_close(counts / 20_000, torch.tensor([0.1, 0.2, 0.7]), atol=0.015, rtol=0)


def test_prompt_that_does_not_fit_is_refused(pair) -> None:
    _, model = pair
    with pytest.raises(UserError, match=r"prompt has 12 tokens.*501 more.*holds 512"):
        generate(model, INPUT_IDS, 501)
    assert generate(model, INPUT_IDS, 0).shape == (3, 12)


@pytest.mark.parametrize(
    "flag", ["--temperature -0.1", "--top_p 0", "--top_p 1.1", "--top_k 0", "--max_new_tokens -1"]
)
def test_flags_out_of_range_are_refused(flag: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["base.py", "--prompt", "Hi", *flag.split()])
    with pytest.raises(SystemExit) as ended:
        cli.run(load_script("generate/base.py").main)
    assert ended.value.code == 2
    assert flag in capsys.readouterr().err


def test_logits_that_are_not_numbers_are_one_line() -> None:
    with pytest.raises(UserError, match=r"not numbers \(NaN\).*--precision 32-true"):
        sample(torch.tensor([[1.0, torch.nan]]), Sampling(1))


def test_an_empty_prompt_is_refused(pair) -> None:
    with pytest.raises(UserError, match=r"a prompt is empty.*no BOS token"):
        generate(pair[1], [INPUT_IDS[0], INPUT_IDS[0, :0]], 3)


def test_a_token_behind_the_embedding_is_an_error_only_where_it_comes_up(pair) -> None:
    assert len(generate(pair[1], torch.tensor([5, 383]), 3)) <= 5
    with pytest.raises(UserError, match="token id 384, the model's embedding only 384 rows"):
        generate(pair[1], [INPUT_IDS[0], torch.tensor([5, 384, 6])], 3)


def test_end_tokens_of_generation_config_stop_as_in_transformers(tmp_path: Path, pair) -> None:
    hf_model, model = pair
    end = int(generate(model, INPUT_IDS[0], 4, temperature=0)[-1])
    hf_model.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, end]}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = theirs.generate(INPUT_IDS[:1], do_sample=False, max_new_tokens=20)[0]
    ours = load_model(tmp_path, dtype=torch.float32)
    actual = generate(ours, INPUT_IDS[0], 20, temperature=0, eos_id=ours.config.eos_token_id)
    assert actual.tolist() == expected.tolist()
    assert len(actual) <= 16


def test_tokens_are_copied_in_order_and_one_step_late(monkeypatch) -> None:
    """With a stand-in for the GPU: a token is waited for after the next one was launched."""
    log = []

    class Stream:
        def record_event(self) -> "Stream":
            return self

        def synchronize(self) -> None:
            log.append("wait")

    def tokens():
        for number in range(3):
            log.append(number)
            yield torch.tensor([number])

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    assert [int(token) for token in copy_to_cpu_async(tokens())] == [0, 1, 2]
    assert log == [0, 1, "wait", 2, "wait", "wait"]


def test_streamed_text_holds_back_half_a_character(tiny_checkpoint: Path) -> None:
    tokenizer = Tokenizer(tiny_checkpoint)
    ids = tokenizer.encode("né 🦙!", bos=False)  # bytes of a character are tokens of their own here
    parts = list(stream_text(tokenizer, ids))
    assert "".join(parts) == "né 🦙!"
    assert len(parts) == len(ids) + 1
    assert {part for part in parts if part} == {"n", "é", " ", "🦙", "!"}
    assert "".join(stream_text(tokenizer, ids[:-2])) == "né \ufffd"  # cut off within one
    assert list(stream_text(tokenizer, [])) == [""]


def test_scripts_print_answers_and_three_figures(
    tmp_path: Path, tiny_checkpoint: Path, capsys
) -> None:
    args = AnswerArgs("Hello", max_new_tokens=10, temperature=0.0, num_samples=2)
    base = load_script("generate/base.py").main
    base(args, tiny_checkpoint, template="alpaca", precision="32-true")
    printed = capsys.readouterr()
    assert "Time for inference 2: " in printed.err
    assert "tokens/sec" in printed.err
    assert "Memory used: " in printed.err
    lora, config = load_model(tiny_checkpoint, dtype=torch.float32), LoRAConfig()
    apply_lora(lora, config)
    tensors = dict(lora.named_parameters())
    save_lora(tensors, tmp_path, config, base_model=str(tiny_checkpoint), template="alpaca")
    load_script("generate/lora.py").main(args, [tmp_path], precision="32-true")
    assert capsys.readouterr().out == printed.out  # an untrained LoRA changes nothing


def test_a_context_is_used_to_its_end(pair) -> None:
    hf_model, model = pair
    prompt = torch.randint(3, 384, (1, 510), generator=torch.Generator().manual_seed(4))
    expected = hf_model.generate(prompt, do_sample=False, max_new_tokens=2, eos_token_id=-1)
    assert generate(model, prompt, 2, temperature=0).tolist() == expected.tolist()


def test_each_answer_has_a_seed_of_its_own(tiny_checkpoint: Path, capsys) -> None:
    texts = []
    for settings in (dict(seed=5, num_samples=2), dict(seed=5), dict(seed=6)):
        args = AnswerArgs("Hello", max_new_tokens=10, **settings)
        load_script("generate/base.py").main(args, tiny_checkpoint, precision="32-true")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] + texts[2]
    assert texts[1] != texts[2]
