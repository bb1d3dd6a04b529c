"""LoRA against `peft`: files both ways, gradients, merging, and a training run."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, load_script, make_hf_model, save_checkpoint_folder, save_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors import safe_open
from test_training import column, read_metrics, start_run
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_llama import LLaMA, UserError, load_model
from lit_llama.data import sample_indices
from lit_llama.lora import LoRAConfig, LoRALinear, apply_lora, load_lora, merge_lora, save_lora
from lit_llama.runtime.args import RunArgs
from lit_llama.storage.loras import init_lora, starting_config
from lit_llama.storage.methods import SaveInfo, save_methods, training_template
from lit_llama.training import TrainArgs, fit, make_optimizer

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
INPUT_IDS = torch.randint(384, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_hf_model(num_key_value_heads=2).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def randomized(model: LLaMA) -> LLaMA:
    """Move B away from zero, where a LoRA does nothing, and DoRA's magnitude from the norms."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "lora_magnitude_vector" in name:
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
    return model


def with_lora(folder: Path, **settings) -> tuple[LLaMA, LoRAConfig]:
    model, config = load_model(folder, dtype=torch.float32), LoRAConfig(**settings)
    apply_lora(model, config)
    return randomized(model).eval(), config


def peft_model(folder: Path, path: Path | None = None, **settings) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if path is not None:
        return PeftModel.from_pretrained(base, path).eval()
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.3  # else an absolute tolerance says nothing
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)  # fp32


OUR_SETTINGS = {
    "q, v": dict(targets=("q_proj", "v_proj")),
    "all": dict(targets=ALL, dropout=0.0),
    "all-linear": dict(targets=("all-linear",)),
    "one layer": dict(targets=("layers.1.mlp.up_proj", "k_proj")),
    "rsLoRA": dict(targets=("q_proj", "v_proj"), use_rslora=True),
    "DoRA": dict(targets=("all-linear",), use_dora=True),
    "rsLoRA and DoRA": dict(targets=("all-linear",), use_rslora=True, use_dora=True),
}


@torch.no_grad()
@pytest.mark.parametrize("settings", OUR_SETTINGS.values(), ids=OUR_SETTINGS)
def test_our_lora_gives_the_same_logits_in_peft(
    folder: Path, tmp_path: Path, settings: dict
) -> None:
    model, config = with_lora(folder, r=4, alpha=12, **settings)
    save_lora(dict(model.named_parameters()), tmp_path / "lora", config, base_model=str(folder))
    base = load_model(folder, dtype=torch.float32)(INPUT_IDS)
    assert (model(INPUT_IDS) - base).std() > 0.1
    assert_close(model(INPUT_IDS), peft_model(folder, tmp_path / "lora")(INPUT_IDS).logits)


PEFT_SETTINGS = {
    "q, v": dict(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"]),
    "all linear": dict(r=4, lora_alpha=12, target_modules="all-linear"),
    "patterns": dict(
        r=4,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 6},
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
    ),
    "alpha of a full name": dict(
        r=4,
        target_modules=["q_proj"],
        alpha_pattern={"model.layers.0.self_attn.q_proj": 64},
    ),
    "alpha of a regular expression": dict(
        r=4,
        target_modules=["q_proj"],
        alpha_pattern={r"^model\.layers\.0\..*q_proj": 64},
    ),
    "head": dict(r=4, target_modules=["lm_head", "q_proj"]),
    "rsLoRA": dict(
        r=4,
        target_modules=["q_proj", "v_proj"],
        use_rslora=True,
        rank_pattern={"v_proj": 6},
    ),
    "DoRA": dict(r=4, target_modules="all-linear", use_dora=True),
    "rsLoRA and DoRA": dict(r=4, target_modules="all-linear", use_dora=True, use_rslora=True),
    "regular expression": dict(r=2, target_modules=r".*layers\.1\.(self_attn|mlp)\.(k|up)_proj"),
    "one layer": dict(
        r=2,
        target_modules=["o_proj"],
        layers_to_transform=[1],
        layers_pattern="layers",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("settings", PEFT_SETTINGS.values(), ids=PEFT_SETTINGS)
def test_lora_of_peft_gives_the_same_logits_here(
    folder: Path, tmp_path: Path, settings: dict
) -> None:
    theirs = randomized(peft_model(folder, **settings)).eval()
    theirs.save_pretrained(tmp_path / "lora")
    model = load_model(folder, dtype=torch.float32)
    config = load_lora(model, tmp_path / "lora")
    assert_close(model(INPUT_IDS), theirs(INPUT_IDS).logits)
    assert config.r == settings["r"]
    assert not model.training


@torch.no_grad()
@pytest.mark.parametrize("settings", OUR_SETTINGS.values(), ids=OUR_SETTINGS)
def test_merged_equals_unmerged_and_leaves_a_plain_model(folder: Path, settings: dict) -> None:
    model, _ = with_lora(folder, r=4, **settings)
    expected = model(INPUT_IDS)
    before = (folder / "model.safetensors").read_bytes()
    merge_lora(model)
    # fp32: sums are rounded elsewhere, by more than 1e-5 in one logit of 30,000
    torch.testing.assert_close(model(INPUT_IDS), expected, atol=2e-5, rtol=1e-5)
    assert (model(INPUT_IDS) - expected).norm() < 2e-6 * expected.norm()
    assert set(model.state_dict()) == set(load_model(folder).state_dict())
    # The weights were memory-mapped from this file.
    assert (folder / "model.safetensors").read_bytes() == before


@torch.no_grad()
def test_merging_into_bf16_rounds_once(folder: Path) -> None:
    model, _ = with_lora(folder, r=4)
    loras = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    expected = {}
    for name, lora in loras.items():
        rounded = lora.base.weight.bfloat16()
        lora.base.weight = torch.nn.Parameter(rounded, requires_grad=False)
        update = lora.lora_B.weight.double() @ lora.lora_A.weight.double()
        expected[name] = (rounded.double() + lora.scaling * update).float()
    merge_lora(model)
    for name, weight in expected.items():
        actual = model.get_submodule(name).weight
        assert actual.dtype == torch.bfloat16
        # at most the nearest bf16 number away: half a unit in the last of 8 bits
        assert ((actual.float() - weight).abs() <= weight.abs() * 2**-8).all()


def test_only_the_lora_trains_and_starts_as_in_the_paper(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32)
    expected = model(INPUT_IDS)
    torch.manual_seed(0)
    apply_lora(model, LoRAConfig(r=4, dropout=0.0, targets=ALL))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    theirs = peft_model(folder, r=4, target_modules=list(ALL))
    assert len(trained) == sum(p.requires_grad for p in theirs.parameters())
    torch.testing.assert_close(model(INPUT_IDS), expected, atol=0, rtol=0)
    # Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(in_features)
    weight = model.layers[0].mlp.down_proj.lora_A.weight
    assert 0.9 / 8 < weight.abs().max() <= 1 / 8


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_gradients_match_peft(tmp_path: Path, dora: bool) -> None:
    """With biases, and with DoRA's norm as a constant."""
    make_hf_model(num_key_value_heads=2, attention_bias=True).save_pretrained(tmp_path / "base")
    settings = dict(targets=("q_proj", "down_proj"), use_dora=dora)
    model, config = with_lora(tmp_path / "base", r=4, **settings)
    save_lora(dict(model.named_parameters()), tmp_path / "lora", config)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "lora", is_trainable=True).eval()
    model(INPUT_IDS).square().mean().backward()
    theirs(INPUT_IDS).logits.square().mean().backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(ours) == len(expected) == 4 * (3 if dora else 2)
    for name, gradient in ours.items():
        layer, kind = name.removesuffix(".weight").rsplit(".", 1)
        reference = expected[f"base_model.model.model.{layer}.{kind}.default.weight"]
        assert reference.norm() > 0
        assert (gradient - reference).norm() < 1e-4 * reference.norm(), name  # fp32


def test_loraplus_raises_the_learning_rate_of_b(folder: Path) -> None:
    """Against the LoRA+ optimizer of `peft`."""
    config = LoRAConfig(r=4, loraplus_lr_ratio=16)
    model = load_model(folder, dtype=torch.float32)
    apply_lora(model, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = make_optimizer(trained, TrainArgs(learning_rate=1e-3), {"LORA": config})
    ours = {1e-3 * g["ratio"]: sum(p.numel() for p in g["params"]) for g in ours.param_groups}
    their_model = peft_model(folder, r=4, target_modules=["q_proj", "v_proj"])
    settings = dict(lr=1e-3, loraplus_lr_ratio=16)
    theirs = create_loraplus_optimizer(their_model, torch.optim.AdamW, **settings)
    groups = [group for group in theirs.param_groups if group["params"]]
    assert ours == {g["lr"]: sum(p.numel() for p in g["params"]) for g in groups}


def test_template_is_in_our_file_and_missing_in_that_of_peft(folder: Path, tmp_path: Path) -> None:
    model, config = with_lora(folder)
    save_lora(dict(model.named_parameters()), tmp_path / "ours", config, template="chatml")
    assert training_template(tmp_path / "ours") == "chatml"
    peft_model(folder, r=4, target_modules=["q_proj"]).save_pretrained(tmp_path / "theirs")
    assert training_template(tmp_path / "theirs") is None


def test_files_have_the_names_and_settings_of_peft(folder: Path, tmp_path: Path) -> None:
    model, config = with_lora(folder, r=4, alpha=12, dropout=0.1)
    save_lora(dict(model.named_parameters()), tmp_path / "ours", config, base_model="base")
    settings = dict(r=4, lora_alpha=12, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    peft_model(folder, **settings).save_pretrained(tmp_path / "theirs")
    names = []
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        with safe_open(path / "adapter_model.safetensors", "pt") as handle:
            keys = handle.keys()
            names.append({name: handle.get_tensor(name).shape for name in keys})
    assert names[0] == names[1]
    files = (tmp_path / name / "adapter_config.json" for name in ("ours", "theirs"))
    ours, theirs = (json.loads(file.read_text()) for file in files)
    for key, value in ours.items():
        if key == "target_modules":
            assert sorted(value) == sorted(theirs[key])
        elif key != "base_model_name_or_path":
            assert value == theirs[key], key


@pytest.mark.parametrize(
    "setting",
    [
        dict(layer_replication=[(0, 1), (0, 1)]),
        dict(init_lora_weights="pissa"),
    ],
    ids=str,
)
def test_unsupported_settings_are_refused(folder: Path, tmp_path: Path, setting: dict) -> None:
    theirs = peft_model(folder, r=4, target_modules=["q_proj"], **setting)
    theirs.save_pretrained(tmp_path / "lora")
    with pytest.raises(UserError, match=f"{next(iter(setting))} is .*not supported"):
        load_lora(load_model(folder), tmp_path / "lora")


def test_merged_folder_loads_in_transformers(tmp_path: Path) -> None:
    base, path, merged = (tmp_path / name for name in ("base", "lora", "merged"))
    save_checkpoint_folder(base)
    model, config = with_lora(base, r=4)
    save_lora(dict(model.named_parameters()), path, config, base_model=str(base))
    load_script("scripts/merge_lora.py").main(path, merged, precision="32-true")
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        assert_close(theirs(INPUT_IDS).logits, model(INPUT_IDS))
    assert (merged / "tokenizer.json").is_file()


def test_twenty_steps_follow_a_plain_peft_loop(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    """Our packed loop against `peft`, `torch` and one sample at a time, from the same start."""
    config = LoRAConfig(r=4, alpha=16, dropout=0.0, targets=("q_proj", "v_proj", "down_proj"))
    run = RunArgs(tmp_path / "out", tiny_checkpoint, tiny_data, precision="32-true", seed=7)
    fabric, dataset, model = start_run(run, lambda model: apply_lora(model, config))
    save_lora(dict(model.module.named_parameters()), tmp_path / "start", config)
    train = TrainArgs(batch_size=4, micro_batch_tokens=256, max_steps=20, learning_rate=1e-2)
    train.schedule, train.warmup_steps = "constant", 0
    train.max_grad_norm, train.weight_decay = 0.5, 0.1
    fit(fabric, model, dataset, {"LORA": config}, train, run, flags={})
    lines = (tmp_path / "out/metrics.csv").read_text().splitlines()[1:]
    losses, norms = ([float(line.split(",")[column]) for line in lines] for column in (3, 6))

    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, betas=(0.9, 0.999), weight_decay=0.1)
    data, expected, expected_norms = dataset.train, [], []
    for step in range(20):
        total, count = torch.zeros(()), 0
        for index in sample_indices(range(4 * step, 4 * step + 4), len(data), seed=7):
            start = sum(data.lengths[:index])
            ids = data.tokens[start : start + data.lengths[index]].long()[None]
            labels = ids.clone()
            labels[:, : data.lengths[index] - data.label_counts[index]] = -100
            total += theirs(ids, labels=labels).loss * data.label_counts[index]
            count += data.label_counts[index]
        optimizer.zero_grad()
        (total / count).backward()
        expected_norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 0.5)))
        optimizer.step()
        expected.append(float(total.detach()) / count)
    assert expected[-1] < expected[0] - 0.5  # it learns something
    torch.testing.assert_close(losses, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(norms, expected_norms, atol=0, rtol=1e-2)
    final = peft_model(tiny_checkpoint, tmp_path / "out")
    for (name, ours), reference in zip(final.named_parameters(), theirs.parameters(), strict=True):
        if "lora" in name:
            torch.testing.assert_close(ours, reference, atol=1e-3, rtol=0)  # twenty steps of 1e-2


def test_a_target_is_a_full_name(folder: Path) -> None:
    """As in `peft`, `proj` does not match `q_proj`."""
    with pytest.raises(ValueError, match="proj"):
        peft_model(folder, target_modules=["proj"])
    with pytest.raises(UserError, match="no linear layer is called 'proj'"):
        apply_lora(load_model(folder), LoRAConfig(targets=("proj",)))
    with pytest.raises(UserError, match=r"lm_head: .*--lora.dropout 0"):
        apply_lora(load_model(folder), LoRAConfig(targets=("lm_head",)))


@torch.no_grad()
def test_dora_starts_as_the_base_if_weights_load_later(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    config = LoRAConfig(r=4, dropout=0.0, targets=("all-linear",), use_dora=True)
    run = RunArgs(tmp_path, tiny_checkpoint, tiny_data, precision="32-true")
    _, _, model = start_run(run, lambda model: apply_lora(model, config))
    theirs = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    expected = theirs(INPUT_IDS).logits
    torch.testing.assert_close(model(INPUT_IDS), expected, atol=1e-4, rtol=0)  # fp32


STARTS = {
    "ours": "--lora.r 4 --lora.alpha 12 --lora.use_dora true --lora.targets [all-linear]",
    "rsLoRA": "--lora.r 4 --lora.alpha 12 --lora.use_rslora true",
}


def first_val_loss(out_dir: Path) -> float:
    (state,) = out_dir.glob("step-*/state.json")
    return json.loads(state.read_text("utf-8"))["first_val_loss"]


@pytest.mark.parametrize("flags", STARTS.values(), ids=STARTS)
def test_a_run_continues_a_lora(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, python: str, flags: str
) -> None:
    """Also on two processes, and resumed on another number of them."""
    common = f"--checkpoint_dir {tiny_checkpoint} --data_dir {tiny_data} --train.batch_size 16"
    common += " --train.warmup_steps 0 --train.learning_rate 1e-2 --lora.dropout 0"
    common += " --precision bf16-mixed --train.kernels [short_attention]"

    def train(out: str, flags: str, status: int = 0) -> str:
        command = f"{python} {ROOT}/finetune/lora.py {common} --out_dir {tmp_path / out} {flags}"
        done = subprocess.run(command.split(), capture_output=True, text=True, timeout=240)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    train("first", f"{flags} --train.max_steps 3")
    last = float(read_metrics(tmp_path / "first")[-1]["val_loss"])
    start = f"--init_from {tmp_path / 'first'}"
    out = train("one", f"{start} --train.max_steps 2 --lora.r 16")
    assert re.search(r"starting from .*: rank 4, alpha 12, targets .*; ignored: --lora.r\n", out)
    train("two", f"{start} --train.max_steps 2 --devices 2")
    before = json.loads((tmp_path / "first/adapter_config.json").read_text("utf-8"))
    for name in ("one", "two"):
        assert f"{first_val_loss(tmp_path / name):.7f}" == f"{last:.7f}"
        after = json.loads((tmp_path / name / "adapter_config.json").read_text("utf-8"))
        linears = ["down_proj", "gate_proj", "up_proj", *(f"{n}_proj" for n in "koqv")]
        if before["target_modules"] == "all-linear":
            before["target_modules"] = linears
        assert after == before | {"lora_dropout": 0.0}
    flags = yaml.safe_load((tmp_path / "one/config.yaml").read_text("utf-8"))
    assert (flags["init_from"], flags["lora"]["r"]) == (str(tmp_path / "first"), 4)
    losses = [column(read_metrics(tmp_path / name), "loss") for name in ("one", "two")]
    torch.testing.assert_close(*losses, atol=1e-3, rtol=0)  # bf16, another order of sums
    assert losses[0][-1] < column(read_metrics(tmp_path / "first"), "loss")[0]
    train("one", f"{start} --train.max_steps 4 --lora.r 16 --resume --devices 2")
    assert len(read_metrics(tmp_path / "one")) == 4
    assert "--init_from was" in train("one", "--train.max_steps 4 --resume", status=1)


@pytest.mark.parametrize("rslora", [False, True], ids=["LoRA", "rsLoRA"])
def test_a_run_continues_a_lora_of_peft(folder: Path, tmp_path: Path, rslora: bool, capsys) -> None:
    """Ranks and scalings differ by layer, and stay."""
    theirs = peft_model(
        folder,
        r=4,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 6},
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
        use_rslora=rslora,
        lora_dropout=0.3,
    )
    theirs = randomized(theirs).eval()
    theirs.save_pretrained(tmp_path / "start")
    config = starting_config(LoRAConfig(dropout=0.1), tmp_path / "start", folder)
    assert config == LoRAConfig(4, 8, 0.1, ("down_proj", "q_proj"), rslora)
    assert "ignored" not in capsys.readouterr().out
    model = load_model(folder, dtype=torch.float32)
    init_lora(model, config, tmp_path / "start")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert_close(model(INPUT_IDS), theirs(INPUT_IDS).logits)
    save_methods(tmp_path / "out", trained.items(), {"LORA": config}, SaveInfo(model, "", ""))
    assert_close(peft_model(folder, tmp_path / "out")(INPUT_IDS).logits, theirs(INPUT_IDS).logits)


def test_what_a_run_cannot_continue_is_refused(folder: Path, tmp_path: Path) -> None:
    tied = tmp_path / "tied"
    make_hf_model(tie_word_embeddings=True).save_pretrained(tied)
    kinds = {
        "embed_tokens": (folder, dict(target_modules=["q_proj", "embed_tokens"])),
        "lm_head.weight": (folder, dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
        "lm_head": (tied, dict(target_modules=["q_proj", "lm_head"])),
        "0": (folder, dict(target_modules=["q_proj", "lm_head"])),
    }
    for name, (base, settings) in kinds.items():
        peft_model(base, r=4, **settings).save_pretrained(tmp_path / name)
        message = f"{tmp_path / name}: changes {name}, too, .*scripts/merge_lora.py"
        if name == "0":  # the copy of the base's head that is stored beside it is no change
            message = "a LoRA of lm_head works without dropout only. Pass --lora.dropout 0"
            assert starting_config(LoRAConfig(dropout=0), tmp_path / name, base).r == 4
        with pytest.raises(UserError, match=message):
            starting_config(LoRAConfig(), tmp_path / name, base)


def test_a_run_says_that_it_does_not_keep_a_tokenizer(tmp_path: Path, capsys) -> None:
    """Of the LoRA that it starts from; not if they are the base's, as many tools save them."""
    base, path = tmp_path / "base", tmp_path / "lora"
    save_checkpoint_folder(base)
    peft_model(base, r=4, target_modules=["q_proj"]).save_pretrained(path)

    def warning() -> str:
        capsys.readouterr()  # those of PEFT
        starting_config(LoRAConfig(), path, base)
        return capsys.readouterr().err

    assert warning() == ""
    save_tokenizer(path)
    assert warning() == ""
    options = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
    (path / "tokenizer_config.json").write_text(json.dumps(options | {"eos_token": "<pad>"}))
    assert re.fullmatch(f"warning: {path}: its tokenizer, .*merge_lora.py\n", warning())
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (path / "tokenizer.json").unlink()
    assert "its chat template, other than" in warning()
    (base / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    assert warning() == ""
