"""Several LoRAs on one base, beside each of them alone and beside PEFT."""

import json
from pathlib import Path

import pytest
import torch
from conftest import load_script, save_checkpoint_folder
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lit_llama import UserError, load_model
from lit_llama.adapter import AdapterConfig, apply_adapter, save_adapter
from lit_llama.decoding import prepare
from lit_llama.generation import generate, side_by_side
from lit_llama.lora import LoRAConfig, load_lora, merge_lora
from lit_llama.many_loras import add_lora, choose_loras, drop_lora, hold_loras

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
PROMPTS = [torch.randint(5, 300, (length,), generator=torch.Generator().manual_seed(length)) for length in range(3, 11)]


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A model folder with biases, and eight LoRAs of different kinds that PEFT has written, none of them zero."""
    folder = tmp_path_factory.mktemp("many")
    save_checkpoint_folder(folder / "base", num_key_value_heads=2, attention_bias=True)
    for number, kind in enumerate(KINDS):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **kind))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / f"lora-{number}")
    return folder / "base", [folder / f"lora-{number}" for number in range(len(KINDS))]


def alone(base: Path, lora: Path | None, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the prompt and what PEFT (or the base in transformers) decodes greedily after it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if lora is None else PeftModel.from_pretrained(model, lora)
    with torch.inference_mode():
        logits = model(prompt[None]).logits[0]
        tokens = model.generate(
            input_ids=prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False, max_new_tokens=12,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return logits, tokens[0]


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_each_row_is_what_its_lora_alone_gives(eight: tuple[Path, list[Path]], prepared: bool) -> None:
    base, folders = eight
    model = load_model(base, dtype=torch.float32)
    hold_loras(model)
    if prepared:
        prepare(model, torch.device("cpu"))
    for folder in folders:
        add_lora(model, folder.name, folder)
    order = [3, None, 7, 0, 5, 1, 2, 6]  # the fifth is the base itself
    names = [None if number is None else folders[number].name for number in order]
    choose_loras(model, names)
    wanted = [alone(base, None if n is None else folders[n], prompt) for n, prompt in zip(order, PROMPTS, strict=True)]
    with torch.inference_mode():
        lengths = [len(prompt) for prompt in PROMPTS]
        logits = model(torch.cat(PROMPTS), lengths).split(lengths)
    decoded = generate(model, PROMPTS, max_new_tokens=12, temperature=0)
    for own, tokens, (want, want_tokens) in zip(logits, decoded, wanted, strict=True):
        assert (own - want).abs().max() < 1e-4
        assert torch.equal(tokens, want_tokens)
    assert len({tuple(logits.argmax(-1).tolist()) for logits, _ in wanted}) == len(wanted)


def test_adding_and_dropping_leaves_the_others_as_they_are(eight: tuple[Path, list[Path]]) -> None:
    base, folders = eight
    model = load_model(base, dtype=torch.float32)
    hold_loras(model)
    for folder in folders[:3]:
        add_lora(model, folder.name, folder)
    ids = torch.stack([torch.arange(10, 16)] * 2)
    choose_loras(model, [folders[0].name, folders[1].name])
    before = model(ids)
    drop_lora(model, folders[2].name)
    add_lora(model, "new", folders[3])
    assert torch.equal(model(ids), before)
    choose_loras(model, [folders[0].name, "new"])
    after = model(ids)
    assert (after[0] - before[0]).abs().max() < 1e-6
    assert (after[1] - before[1]).abs().max() > 0.1
    add_lora(model, "new", folders[1])  # in the place of the other
    choose_loras(model, [folders[0].name, "new"])
    assert torch.equal(model(ids), before)
    choose_loras(model, [None, None])
    plain = load_model(base, dtype=torch.float32)(ids)
    assert (model(ids) - plain).abs().max() < 1e-6
    with pytest.raises(ValueError, match=f"no LoRA called {folders[2].name}"):
        choose_loras(model, [folders[2].name])
    with pytest.raises(ValueError, match="a batch of 3 rows, but choose_loras was called for 2"):
        model(torch.cat([ids, ids[:1]]))


def test_in_bf16_it_is_what_load_lora_gives(eight: tuple[Path, list[Path]]) -> None:
    base, folders = eight
    for number in (2, 3):  # all-linear, and DoRA, whose scale is near one
        model, single = load_model(base), load_model(base)
        hold_loras(model)
        add_lora(model, "one", folders[number])
        choose_loras(model, ["one"])
        load_lora(single, folders[number])
        with torch.inference_mode():
            assert torch.equal(model(PROMPTS[7][None]), single(PROMPTS[7][None]))
        packed = load_model(base)
        hold_loras(packed)
        prepare(packed, torch.device("cpu"))
        add_lora(packed, "one", folders[number])
        choose_loras(packed, ["one"])
        logits = model(PROMPTS[7][None])
        assert (packed(PROMPTS[7][None]) - logits).abs().max() < 0.03 * logits.abs().max()


def test_what_cannot_be_shared_is_refused(eight: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = eight
    model = load_model(base, dtype=torch.float32)
    with pytest.raises(ValueError, match="call hold_loras first"):
        add_lora(model, "one", folders[0])
    with_adapter = tmp_path / "with_adapter"
    with_adapter.mkdir()
    for file in folders[0].iterdir():
        (with_adapter / file.name).write_bytes(file.read_bytes())
    other = load_model(base, dtype=torch.float32)
    apply_adapter(other, AdapterConfig(start_layer=0))
    save_adapter(dict(other.named_parameters()), with_adapter / "adapter", AdapterConfig(start_layer=0), other)
    hold_loras(model)
    with pytest.raises(UserError, match="was trained with an adapter"):
        add_lora(model, "one", with_adapter)


def test_the_script_answers_with_each(eight: tuple[Path, list[Path]], tmp_path: Path, capsys) -> None:
    base, folders = eight
    script = load_script("generate/lora.py")
    flags = dict(checkpoint_dir=base, template="none", precision="32-true", temperature=0, max_new_tokens=6)
    single = []
    for folder in folders[:2]:
        script.main([folder], prompt="the dog", **flags)
        single.append(capsys.readouterr().out.rstrip("\n"))
    script.main(folders[:2], prompt="the dog", **flags)
    shown = capsys.readouterr().out.rstrip("\n")
    assert shown == "\n".join(side_by_side(dict(zip(map(str, folders), single, strict=False))))
    (tmp_path / "prompts.txt").write_text("the dog\nthe fox and\n", "utf-8")
    script.main(folders[:2], prompt_file=tmp_path / "prompts.txt", **flags)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["the dog", "the fox and"]
    assert lines[0]["answers"] == dict(zip(map(str, folders), single, strict=False))
    with pytest.raises(UserError, match="--lora_path"):
        script.main([folders[0], folders[0]], prompt="the dog", **flags)


def test_columns_or_blocks() -> None:
    texts = {"a": "one two three four five six seven eight nine ten", "b": "short\n\nlines"}
    wide = side_by_side(texts, 80)
    assert wide[0] == "a" + " " * 40 + "b"
    assert wide[2:] == ["one two three four five six seven eight  short", "nine ten", " " * 41 + "lines"]
    assert side_by_side(texts, 60) == ["a", "-", texts["a"], "", "b", "-", "short", "", "lines"]


def test_weighted_sum_is_pefts(eight: tuple[Path, list[Path]], tmp_path: Path, capsys) -> None:
    """PEFT's combination_type "cat", and the merged model."""
    base, folders = eight
    parts, weights = [folders[0], folders[1], folders[5], folders[2]], [0.7, -0.4, 1.0, 0.5]
    script = load_script("scripts/combine_loras.py")
    script.main(parts, tmp_path / "sum", weights, checkpoint_dir=base)
    assert "LoRA of rank " in capsys.readouterr().out
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), parts[0], adapter_name="0")
    for number, part in enumerate(parts[1:], start=1):
        reference.load_adapter(part, adapter_name=str(number))
    # layer by layer, for PEFT's own sum wants equal targets: what each one adds to the base's weight, times its weight
    deltas: dict[str, torch.Tensor] = {}
    for name, module in reference.named_modules():
        for number, weight in enumerate(weights):
            if hasattr(module, "lora_A") and str(number) in module.lora_A:
                own = name.removeprefix("base_model.model.model.")
                deltas[own] = deltas.get(own, 0) + weight * module.get_delta_weight(str(number))
    plain, merged = load_model(base, dtype=torch.float32), load_model(base, dtype=torch.float32)
    load_lora(merged, tmp_path / "sum")
    merge_lora(merged)
    found = {
        name.removesuffix(".weight"): (parameter - plain.get_parameter(name)).detach()
        for name, parameter in merged.named_parameters()
    }
    for name, delta in found.items():
        assert (delta - deltas.get(name, torch.zeros(()))).abs().max() < 1e-5, name
    # and PEFT reads it, ranks by layer included
    back = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "sum")
    with torch.inference_mode():
        assert (back(PROMPTS[3][None]).logits - merged(PROMPTS[3][None])).abs().max() < 1e-4


def test_equal_loras_sum_as_peft_sums_them(eight: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = eight
    other = tmp_path / "other"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **KINDS[0]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(other)
    load_script("scripts/combine_loras.py").main([folders[0], other], tmp_path / "sum", [0.3, 0.7], checkpoint_dir=base)
    settings = json.loads((tmp_path / "sum/adapter_config.json").read_text("utf-8"))
    assert (settings["r"], settings["target_modules"]) == (16, ["q_proj", "v_proj"])
    model.load_adapter(folders[0], adapter_name="first")
    model.add_weighted_adapter(["first", "default"], [0.3, 0.7], "sum", combination_type="cat")
    model.set_adapter("sum")
    ours = load_model(base, dtype=torch.float32)
    assert load_lora(ours, tmp_path / "sum") == LoRAConfig(16, 16, 0.0, ("q_proj", "v_proj"))
    with torch.inference_mode():
        assert (model(PROMPTS[4][None]).logits - ours(PROMPTS[4][None])).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [([0, 1], [1.0], "--weights: 1 for 2"), ([0, 3], None, "is a DoRA"), ([], None, "--weights: 0 for 0")],
)
def test_sums_that_are_none(eight: tuple[Path, list[Path]], tmp_path: Path, parts, weights, message) -> None:
    base, folders = eight
    with pytest.raises(UserError, match=message):
        load_script("scripts/combine_loras.py").main(
            [folders[n] for n in parts], tmp_path / "sum", weights, checkpoint_dir=base
        )
    assert not (tmp_path / "sum").exists()
