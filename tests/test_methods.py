"""A method that the library does not know: (IA)^3, as CONTRIBUTING.md tells to add it.

The test runs the code of that page: one file, one entry in `METHODS`, one script.
"""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, load_script
from peft import IA3Config, get_peft_model
from test_training import CPU, column, read_metrics
from transformers import AutoModelForCausalLM

from lit_llama import load_model
from lit_llama.runtime.args import RunArgs
from lit_llama.storage import methods
from lit_llama.storage.run_folder import checkpoints
from lit_llama.training import TrainArgs

INPUT_IDS = torch.randint(384, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def script(tmp_path: Path, monkeypatch) -> ModuleType:
    """Add the method to the library; return its script."""
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    code, entry, script_code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "ia3.py").write_text(code, "utf-8")
    (tmp_path / "finetune_ia3.py").write_text(script_code, "utf-8")
    module = load_script(str(tmp_path / "ia3.py"))
    monkeypatch.setitem(sys.modules, "lit_llama.ia3", module)
    for name, method in eval(f"{{{entry}}}", vars(methods) | vars(module)).items():
        monkeypatch.setitem(methods.METHODS, name, method)
    return load_script(str(tmp_path / "finetune_ia3.py"))


@torch.no_grad()
def test_logits_match_peft(tiny_checkpoint: Path, script: ModuleType) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    start = model(INPUT_IDS)
    methods.METHODS["ia3"].apply(model, script.IA3Config())
    assert torch.equal(model(INPUT_IDS), start)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    targets = dict(target_modules=["k_proj", "v_proj", "down_proj"])
    config = IA3Config(task_type="CAUSAL_LM", **targets, feedforward_modules=["down_proj"])
    theirs = get_peft_model(base, config).eval()
    torch.manual_seed(0)
    references = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        if name.endswith(".ia3_scale"):
            layer = name.removesuffix(".ia3_scale")
            reference = references[f"base_model.model.model.{layer}.ia3_l.default"]
            reference.copy_(torch.rand_like(reference) * 2)
            parameter.copy_(reference.flatten())
    expected = theirs(INPUT_IDS).logits
    torch.testing.assert_close(model(INPUT_IDS), expected, atol=1e-5, rtol=1e-5)  # fp32


def test_it_trains_resumes_answers_and_is_compared_and_estimated(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, script: ModuleType, monkeypatch, capsys
) -> None:
    def train(name: str, max_steps: int, resume: bool = False) -> None:
        folders = (tmp_path / name, tiny_checkpoint, tiny_data)
        recipe = dict(batch_size=16, learning_rate=3e-2, warmup_steps=0, schedule="constant")
        run = RunArgs(*folders, precision="32-true", resume=resume)
        script.main(run, train=TrainArgs(max_steps=max_steps, **recipe))

    train("complete", 6)
    train("out", 3)
    train("out", 6, resume=True)
    out = tmp_path / "out"
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("complete", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert checkpoints(out)[-1].name == "step-000006"
    rows = read_metrics(out)
    assert column(rows, "loss")[-1] < column(rows, "loss")[0] - 0.1

    generate = load_script("generate/adapter.py")
    capsys.readouterr()
    args = generate.AnswerArgs("Count to 3.", max_new_tokens=16, temperature=0.0)
    generate.main(args, out, precision="32-true")
    answer = capsys.readouterr().out
    model, tokenizer, template = methods.load_finetuned(out, None, CPU, torch.float32)
    assert template == "alpaca"
    assert sum("ia3_scale" in name for name in model.state_dict()) == 6
    generate.answer(model, tokenizer, template, ["Count to 3."], args)
    assert capsys.readouterr().out == answer

    compare = load_script("evaluate/compare.py")
    monkeypatch.setattr(compare, "in_own_process", compare.measure)  # which knows the method
    folders = [tiny_checkpoint, out]
    compare.main(folders, data_dir=tiny_data, out_dir=tmp_path / "compared", max_new_tokens=4)
    before, after = json.loads((tmp_path / "compared/compare.json").read_text())["models"]
    assert after["loss"] == pytest.approx(float(rows[-1]["val_loss"]), rel=1e-2)  # bf16
    assert after["loss"] < before["loss"] - 0.1

    capsys.readouterr()
    load_script("scripts/estimate_memory.py").main("TinyLlama-1.1B", "ia3", precision="32-true")
    # 22 layers of two times 256 and of 5,632 features, in fp32
    assert re.search(r"gradients +0\.001 GB", capsys.readouterr().out)


def test_scripts_are_short() -> None:
    names = ("base", "lora", "adapter", "adapter_v2", "full")
    for path in [*(ROOT / "finetune").glob("*.py"), *(ROOT / f"generate/{n}.py" for n in names)]:
        assert len(path.read_text("utf-8").splitlines()) <= 60, path
