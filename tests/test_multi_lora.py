"""Several LoRAs on one base against each of them alone, and sums of LoRAs, both in `peft`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from answering import side_by_side
from conftest import load_script, save_checkpoint_folder
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lit_llama import UserError, load_model
from lit_llama.adapter import AdapterConfig, apply_adapter
from lit_llama.fast.decoding import StaticLLaMA, optimize_for_inference
from lit_llama.generation import generate
from lit_llama.lora import LoRAConfig, load_lora, merge_lora
from lit_llama.multi_lora import delete_adapter, enable_multi_lora, load_adapter, set_adapters

KINDS = [
    dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    dict(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]),
    dict(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True),
    dict(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_dora=True),
    dict(r=5, lora_alpha=5, target_modules=["layers.1.self_attn.q_proj"]),
    dict(r=8, lora_alpha=16, target_modules=["gate_proj", "v_proj"], rank_pattern={"v_proj": 3}),
    dict(r=1, lora_alpha=3, target_modules=["v_proj"]),
    dict(r=6, lora_alpha=2, target_modules="all-linear", use_dora=True),
]


def random_prompt(length: int) -> torch.Tensor:
    return torch.randint(5, 300, (length,), generator=torch.Generator().manual_seed(length))


PROMPTS = [random_prompt(length) for length in range(3, 11)]


def randomized_peft_model(base: Path, settings: dict) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A model folder with biases, and eight different LoRAs that `peft` has written."""
    folder = tmp_path_factory.mktemp("many")
    save_checkpoint_folder(folder / "base", num_key_value_heads=2, attention_bias=True)
    for number, kind in enumerate(KINDS):
        torch.manual_seed(number)
        randomized_peft_model(folder / "base", kind).save_pretrained(folder / f"lora-{number}")
    return folder / "base", [folder / f"lora-{number}" for number in range(len(KINDS))]


def alone(base: Path, lora: Path | None, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of a prompt, and prompt and greedy answer, of one LoRA in `peft`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if lora is None else PeftModel.from_pretrained(model, lora)
    ids, greedy = prompt[None], dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=12, **greedy)
        return model(ids).logits[0], tokens[0]


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
def test_each_row_equals_its_lora_alone(eight: tuple[Path, list[Path]], optimized: bool) -> None:
    base, folders = eight
    model = load_model(base, dtype=torch.float32)
    enable_multi_lora(model)
    if optimized:
        optimize_for_inference(model, torch.device("cpu"))
    for folder in folders:
        load_adapter(model, folder.name, folder)
    order = [3, None, 7, 0, 5, 1, 2, 6]  # None: the base alone
    paths = [None if number is None else folders[number] for number in order]
    set_adapters(model, [path and path.name for path in paths])
    expected = [alone(base, path, prompt) for path, prompt in zip(paths, PROMPTS, strict=True)]
    with torch.inference_mode():
        lengths = [len(prompt) for prompt in PROMPTS]
        logits = model(torch.cat(PROMPTS), lengths).split(lengths)
    decoded = generate(model, PROMPTS, max_new_tokens=12, temperature=0)
    for ours, tokens, (theirs, their_tokens) in zip(logits, decoded, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-4
        assert torch.equal(tokens, their_tokens)
    assert len({tuple(logits.argmax(-1).tolist()) for logits, _ in expected}) == len(expected)


def test_loading_and_deleting_does_not_change_the_others(eight: tuple[Path, list[Path]]) -> None:
    base, folders = eight
    model = load_model(base, dtype=torch.float32)
    enable_multi_lora(model, folders[:3])
    first, second, third = map(str, folders[:3])
    ids = torch.stack([torch.arange(10, 16)] * 2)
    set_adapters(model, [first, second])
    before = model(ids)
    delete_adapter(model, third)
    load_adapter(model, "new", folders[3])
    assert torch.equal(model(ids), before)
    set_adapters(model, [first, "new"])
    after = model(ids)
    assert (after[0] - before[0]).abs().max() < 1e-6
    assert (after[1] - before[1]).abs().max() > 0.1
    load_adapter(model, "new", folders[1])  # replaces the other
    set_adapters(model, [first, "new"])
    assert torch.equal(model(ids), before)
    set_adapters(model, [None, None])
    plain = load_model(base, dtype=torch.float32)(ids)
    assert (model(ids) - plain).abs().max() < 1e-6
    with pytest.raises(ValueError, match=f"no LoRA called {third}"):
        set_adapters(model, [third])
    with pytest.raises(ValueError, match="a batch of 3 rows, but set_adapters got 2 names"):
        model(torch.cat([ids, ids[:1]]))


def test_in_bf16_it_equals_load_lora(eight: tuple[Path, list[Path]]) -> None:
    base, folders = eight
    for number in (2, 3):  # all-linear, and DoRA, whose scale is near one
        model, single, packed = (load_model(base) for _ in range(3))
        enable_multi_lora(packed)
        optimize_for_inference(packed, torch.device("cpu"))
        load_adapter(packed, "one", folders[number])
        enable_multi_lora(model)
        load_adapter(model, "one", folders[number])
        for several in (model, packed):
            set_adapters(several, ["one"])
        load_lora(single, folders[number])
        with torch.inference_mode():
            logits = model(PROMPTS[7][None])
            assert torch.equal(logits, single(PROMPTS[7][None]))
            assert (packed(PROMPTS[7][None]) - logits).abs().max() < 0.03 * logits.abs().max()


def test_a_lora_with_an_adapter_is_refused(eight: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = eight
    model = load_model(base, dtype=torch.float32)
    shutil.copytree(folders[0], tmp_path / "lora")
    (tmp_path / "lora/adapter").mkdir()
    enable_multi_lora(model)
    with pytest.raises(UserError, match="was trained with an adapter"):
        load_adapter(model, "one", tmp_path / "lora")
    other = load_model(base, dtype=torch.float32)
    apply_adapter(other, AdapterConfig(start_layer=0))
    with pytest.raises(UserError, match="beside an adapter"):
        enable_multi_lora(other)


def test_the_script_answers_with_each(
    eight: tuple[Path, list[Path]], tmp_path: Path, capsys
) -> None:
    base, folders = eight
    script = load_script("generate/lora.py")

    def run(paths: list[Path], prompt: str | None = "the dog", **settings) -> str:
        args = script.AnswerArgs(prompt, max_new_tokens=6, temperature=0, **settings)
        script.main(args, paths, base, template="none", precision="32-true")
        return capsys.readouterr().out.rstrip("\n")

    single = {str(folder): run([folder]) for folder in folders[:2]}
    assert run(folders[:2]) == "\n".join(side_by_side(single))
    (tmp_path / "prompts.txt").write_text("the dog\nthe fox and\n", "utf-8")
    lines = run(folders[:2], None, prompt_file=tmp_path / "prompts.txt").splitlines()
    lines = [json.loads(line) for line in lines]
    assert [line["prompt"] for line in lines] == ["the dog", "the fox and"]
    assert lines[0]["answers"] == single
    with pytest.raises(UserError, match="--lora_path"):
        run([folders[0], folders[0]])


def test_columns_or_blocks() -> None:
    texts = {"a": "one two three four five six seven eight nine ten", "b": "short\n\nlines"}
    wide = side_by_side(texts, 80)
    assert wide[0] == "a" + " " * 40 + "b"
    first = "one two three four five six seven eight  short"
    assert wide[2:] == [first, "nine ten", " " * 41 + "lines"]
    blocks = ["a", "-", texts["a"], "", "b", "-", "short", "", "lines"]
    assert side_by_side(texts, 60) == blocks


def test_weighted_sum_equals_that_of_peft(eight: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Layer by layer, because the sum in `peft` requires equal targets; and the merged model."""
    base, folders = eight
    parts, weights = [folders[0], folders[1], folders[5], folders[2]], [0.7, -0.4, 1.0, 0.5]
    script = load_script("scripts/combine_loras.py")
    script.main(parts, tmp_path / "sum", weights, checkpoint_dir=base)
    theirs = AutoModelForCausalLM.from_pretrained(base)
    theirs = PeftModel.from_pretrained(theirs, parts[0], adapter_name="0")
    for number, part in enumerate(parts[1:], start=1):
        theirs.load_adapter(part, adapter_name=str(number))
    deltas: dict[str, torch.Tensor] = {}
    for name, module in theirs.named_modules():
        name = name.removeprefix("base_model.model.model.")
        for number, weight in enumerate(weights):
            if hasattr(module, "lora_A") and str(number) in module.lora_A:
                delta = weight * module.get_delta_weight(str(number))
                deltas[name] = deltas.get(name, 0) + delta
    plain, merged = (load_model(base, dtype=torch.float32) for _ in range(2))
    load_lora(merged, tmp_path / "sum")
    merge_lora(merged)
    for name, parameter in merged.named_parameters():
        delta = deltas.get(name.removesuffix(".weight"), torch.zeros(()))
        assert (parameter - plain.get_parameter(name) - delta).abs().max() < 1e-5, name
    # `peft` reads the sum, ranks by layer included
    model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, tmp_path / "sum")
    with torch.inference_mode():
        ids = PROMPTS[3][None]
        assert (model(ids).logits - merged(ids)).abs().max() < 1e-4


def test_loras_of_equal_targets_sum_as_in_peft(
    eight: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, folders = eight
    parts = [folders[0], tmp_path / "other"]
    model = randomized_peft_model(base, KINDS[0])
    model.save_pretrained(parts[1])
    combine = load_script("scripts/combine_loras.py").main
    combine(parts, tmp_path / "sum", [0.3, 0.7], checkpoint_dir=base)
    settings = json.loads((tmp_path / "sum/adapter_config.json").read_text("utf-8"))
    assert (settings["r"], settings["target_modules"]) == (16, ["q_proj", "v_proj"])
    model.load_adapter(folders[0], adapter_name="first")
    names = ["first", "default"]
    model.add_weighted_adapter(names, [0.3, 0.7], "sum", combination_type="cat")
    model.set_adapter("sum")
    ours = load_model(base, dtype=torch.float32)
    assert load_lora(ours, tmp_path / "sum") == LoRAConfig(16, 16, 0.0, ("q_proj", "v_proj"))
    with torch.inference_mode():
        assert (model(PROMPTS[4][None]).logits - ours(PROMPTS[4][None])).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ([0, 1], [1.0], "--weights: 1 for 2"),
        ([0, 3], None, "is a DoRA"),
        ([], None, "--weights: 0 for 0"),
    ],
)
def test_impossible_sums_are_refused(
    eight: tuple[Path, list[Path]], tmp_path: Path, parts, weights, message
) -> None:
    base, folders = eight
    combine, paths = load_script("scripts/combine_loras.py").main, [folders[n] for n in parts]
    with pytest.raises(UserError, match=message):
        combine(paths, tmp_path / "sum", weights, checkpoint_dir=base)
    assert not (tmp_path / "sum").exists()


def test_a_static_cache_gives_the_same_answers(eight: tuple[Path, list[Path]]) -> None:
    """As on a GPU, where the model's class has another signature."""
    base, folders = eight
    answers = []
    for static in (False, True):
        model = load_model(base, dtype=torch.float32)
        enable_multi_lora(model, folders[:2])
        if static:
            model.__class__ = StaticLLaMA
        set_adapters(model, [str(folder) for folder in folders[:2]])
        answers.append(generate(model, PROMPTS[:2], 8, temperature=0))
    for plain, static in zip(*answers, strict=True):
        assert torch.equal(plain, static)


def test_a_recorded_step_is_kept_until_other_loras_are_used(
    eight: tuple[Path, list[Path]],
) -> None:
    base, folders = eight
    model = load_model(base, dtype=torch.float32)
    enable_multi_lora(model, folders[:2])
    model.__class__ = StaticLLaMA
    names = [str(folder) for folder in folders[:2]]
    for chosen in ([None], names[:1], names[1:]):
        set_adapters(model, chosen)
        generate(model, PROMPTS[0], 4)
        model.step.graph = graph = object()  # as on a GPU
        generate(model, PROMPTS[0], 4)
        assert model.step.graph is graph
    set_adapters(model, names[:1])
    generate(model, PROMPTS[0], 4)
    assert model.step.graph is None
