"""Results of the scripts in `peft`, `transformers` and, as far as files tell, vLLM, llama.cpp."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from conftest import load_script, save_checkpoint_folder
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_llama import load_model
from lit_llama.lora import load_lora
from lit_llama.runtime import cli

INPUT_IDS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
PROMPT = "jumps"
METHODS = {
    "query and value": "",
    "all-linear": "--lora.targets [all-linear]",
    "rsLoRA": "--lora.targets [q_proj,down_proj] --lora.use_rslora true",
    "DoRA": "--lora.targets [all-linear] --lora.use_dora true",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder whose tokenizer knows each of the model's tokens."""
    save_checkpoint_folder(tmp_path / "base", num_key_value_heads=2, vocab_size=300)
    return tmp_path / "base"


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., str]:
    """Runs a script as the command line does; returns what it printed."""

    def call(script: str, flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *flags.split()])
        capsys.readouterr()
        cli.run(load_script(script).main)
        return capsys.readouterr().out

    return call


@pytest.fixture
def train(call: Callable, base: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Finetunes with a script, far enough to change the answers; returns the run's folder."""

    def train(method: str, flags: str = "") -> Path:
        common = f"--checkpoint_dir {base} --data_dir {tiny_data} --out_dir {tmp_path}/out"
        recipe = "--precision 32-true --train.max_steps 6 --train.batch_size 16"
        recipe += " --train.learning_rate 3e-2 --train.warmup_steps 0"
        call(f"finetune/{method}.py", f"{common} {recipe} {flags}")
        return tmp_path / "out"

    return train


def ask(call: Callable, script: str, flags: str) -> str:
    """A script's greedy answer."""
    sampling = "--precision 32-true --temperature 0 --max_new_tokens 24 --template none"
    return call(script, f"{flags} {sampling} --prompt {PROMPT}").removesuffix("\n")


def greedy(model: nn.Module, folder: Path) -> str:
    """The greedy answer of `transformers`, with the tokenizer that it makes of `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # published tokenizers put BOS in front themselves, this one only says so in its config
    ids = tokenizer(f"<s>{PROMPT}", add_special_tokens=False, return_tensors="pt").input_ids
    new = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[
        0, ids.size(1) :
    ]
    return tokenizer.decode(new, skip_special_tokens=True)


def hf_model(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_same(actual: Tensor, expected: Tensor, other: Tensor) -> None:
    """fp32 logits that are the same, and not those of the model before."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)
    assert (expected - other).std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("flags", METHODS.values(), ids=METHODS)
def test_a_trained_lora_answers_alike_elsewhere(
    call: Callable, train: Callable, base: Path, tmp_path: Path, flags: str
) -> None:
    with torch.enable_grad():
        out = train("lora", flags)
    model, before = load_model(base, dtype=torch.float32), hf_model(base)(INPUT_IDS).logits
    load_lora(model, out)
    expected, answer = model(INPUT_IDS), ask(call, "generate/lora.py", f"--lora_path {out}")

    in_peft = PeftModel.from_pretrained(hf_model(base), out).eval()
    assert_same(in_peft(INPUT_IDS).logits, expected, before)
    assert greedy(in_peft, base) == answer

    if (
        "dora" not in flags
    ):  # transformers 5.23 leaves DoRA's magnitudes out, those that peft has saved too
        in_transformers = hf_model(base)
        in_transformers.load_adapter(str(out))
        assert_same(in_transformers(INPUT_IDS).logits, expected, before)
        assert greedy(in_transformers, base) == answer

    call(
        "scripts/merge_lora.py",
        f"--lora_path {out} --out_dir {tmp_path}/merged --precision 32-true",
    )
    merged = hf_model(tmp_path / "merged")
    assert_same(merged(INPUT_IDS).logits, expected, before)
    assert (
        greedy(merged, tmp_path / "merged")
        == answer
        == ask(call, "generate/base.py", f"--checkpoint_dir {merged.name_or_path}")
    )
    assert answer != greedy(hf_model(base), base)


@torch.no_grad()
def test_a_fully_finetuned_model_answers_alike_in_transformers(
    call: Callable, train: Callable, base: Path
) -> None:
    with torch.enable_grad():
        out = train("full", "--train.learning_rate 1e-2")
    theirs = hf_model(out)
    assert_same(
        theirs(INPUT_IDS).logits,
        load_model(out, dtype=torch.float32)(INPUT_IDS),
        hf_model(base)(INPUT_IDS).logits,
    )
    assert greedy(theirs, out) == ask(call, "generate/full.py", f"--checkpoint_dir {out}")


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["LoRA", "rsLoRA", "DoRA"]
)
def test_a_lora_of_peft_answers_alike_here(
    call: Callable, base: Path, tmp_path: Path, settings: dict
) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules="all-linear", **settings
    )
    theirs = get_peft_model(hf_model(base), config).eval()
    torch.manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "lora")
    answer = ask(
        call, "generate/lora.py", f"--lora_path {tmp_path}/lora"
    )  # whose base is the folder that PEFT noted
    assert answer == greedy(theirs, base) != greedy(hf_model(base), base)


@pytest.mark.parametrize("flags", list(METHODS.values())[:3], ids=list(METHODS)[:3])
def test_vllm_finds_in_a_lora_what_it_reads(train: Callable, base: Path, flags: str) -> None:
    """vllm/lora/peft_helper.py reads the settings, LoRAModel.from_local_checkpoint the tensors."""
    out = train("lora", flags)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert type(settings["r"]) is int
    assert settings["r"] <= 16  # its --max-lora-rank, if not given
    assert type(settings["lora_alpha"]) in (int, float)
    assert type(settings["target_modules"]) in (list, str)
    assert settings["use_rslora"] == ("rslora" in flags)
    assert (settings["bias"], settings["use_dora"], settings.get("modules_to_save")) == (
        "none",
        False,
        None,
    )
    linears = {
        name: module
        for name, module in hf_model(base).named_modules()
        if isinstance(module, nn.Linear)
    }
    sides: dict[str, dict[str, list[int]]] = {}
    for name, tensor in load_file(out / "adapter_model.safetensors").items():
        module, side = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", name).groups()
        sides.setdefault(module, {})[side] = list(tensor.shape)
    targets = (
        "_proj" if settings["target_modules"] == "all-linear" else tuple(settings["target_modules"])
    )
    assert sides.keys() == {name for name in linears if name.endswith(targets)}
    for name, shapes in sides.items():
        out_features, in_features = linears[name].weight.shape
        assert shapes == {
            "lora_A": [settings["r"], in_features],
            "lora_B": [out_features, settings["r"]],
        }


def test_llama_cpp_finds_in_the_folders_what_it_converts(
    train: Callable, call: Callable, base: Path, tmp_path: Path
) -> None:
    """Names map with `gguf`; a LoRA's as in get_base_tensor_name of convert_lora_to_gguf.py."""
    out = train("lora", "--lora.targets [all-linear]")
    call("scripts/merge_lora.py", f"--lora_path {out} --out_dir {tmp_path}/merged")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    mapped = {}
    for file in (out / "adapter_model.safetensors", tmp_path / "merged/model.safetensors"):
        stored = {
            re.sub(r"^base_model\.model\.|\.lora_[AB](?=\.weight$)", "", name)
            for name in load_file(file)
        }
        mapped[file.parent.name] = {
            names.get_name(name, try_suffixes=(".weight",)) for name in stored
        }
    parts = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
    linears = {f"blk.{layer}.{part}.weight" for layer in range(2) for part in parts}
    norms = {f"blk.{layer}.{part}_norm.weight" for layer in range(2) for part in ("attn", "ffn")}
    assert mapped["out"] == linears
    assert mapped["merged"] == linears | norms | {
        "token_embd.weight",
        "output_norm.weight",
        "output.weight",
    }

    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert {
        tensor.dtype for tensor in load_file(tmp_path / "merged/model.safetensors").values()
    } == {torch.float32}  # as the base
    vocab, special = (
        gguf.vocab.BpeVocab(tmp_path / "merged"),
        gguf.SpecialVocab(tmp_path / "merged", load_merges=True),
    )
    assert vocab.vocab_size == config["vocab_size"]
    assert special.special_token_ids == {"bos": 1, "eos": 2}
    assert special.merges == gguf.SpecialVocab(base, load_merges=True).merges != []
