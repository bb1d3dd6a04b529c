"""A method that the library knows nothing of: (IA)^3, Liu et al. 2022, arXiv 2205.05638, made in this file alone.

It learns a factor for each feature of the keys and values and of the MLP's inner activations. CONTRIBUTING.md tells
its story; `peft` has the same method, and must give the same logits.
"""

from pathlib import Path

import pytest
import torch
from conftest import ROOT
from peft import IA3Config, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_llama import LLaMA, load_model
from lit_llama.files import read_tensors
from lit_llama.methods import base_linears, base_name, copy_into, place_of, replace_module, save_method
from lit_llama.run import Run
from lit_llama.run_folder import checkpoints
from lit_llama.training import TrainArgs, fit

INPUT_IDS = torch.randint(384, (2, 40), generator=torch.Generator().manual_seed(1))


class IA3Linear(nn.Module):
    """base(x) * l, or for the MLP base(x * l): section 3.3."""

    def __init__(self, base: nn.Linear, scales_input: bool) -> None:
        super().__init__()
        self.base, self.scales_input = base, scales_input
        size = base.in_features if scales_input else base.out_features
        self.ia3 = nn.Parameter(torch.ones(size, device=place_of(base.weight)))

    def forward(self, x: Tensor) -> Tensor:
        factor = self.ia3.to(x.dtype)
        return self.base(x * factor) if self.scales_input else self.base(x) * factor


def apply_ia3(model: LLaMA) -> None:
    for name, linear in base_linears(model).items():
        if name.endswith(("k_proj", "v_proj", "down_proj")):
            replace_module(model, name, IA3Linear(linear, scales_input=name.endswith("down_proj")))


def save_ia3(tensors: dict[str, Tensor], folder: Path) -> None:
    save_method(folder, {"method": "ia3"}, {base_name(name): tensor for name, tensor in tensors.items()}, template="")


def load_ia3(model: LLaMA, folder: Path) -> None:
    apply_ia3(model)
    tensors, _ = read_tensors(folder / "adapter_model.safetensors")
    copy_into(model, tensors, [name for name, _ in model.named_parameters() if name.endswith(".ia3")], folder)


def train(out_dir: Path, checkpoint: Path, data: Path, resume: bool = False, **recipe) -> Run:
    run = Run(out_dir, checkpoint, data, precision="32-true", resume=resume)
    model = run.build(apply_ia3)
    args = TrainArgs(batch_size=16, learning_rate=3e-2, warmup_steps=0, **recipe)
    fit(run, model, args, lambda folder, tensors: save_ia3(dict(tensors), folder))
    return run


@torch.no_grad()
def test_logits_are_pefts(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    apply_ia3(model)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    settings = dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    theirs = get_peft_model(base, IA3Config(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(0)
    references = {name: parameter for name, parameter in theirs.named_parameters() if "ia3_l" in name}
    for name, parameter in model.named_parameters():
        if name.endswith(".ia3"):
            reference = references[f"base_model.model.model.{name.removesuffix('.ia3')}.ia3_l.default"]
            reference.copy_(torch.rand_like(reference) * 2)
            parameter.copy_(reference.flatten())
    torch.testing.assert_close(model(INPUT_IDS), theirs(INPUT_IDS).logits, atol=1e-5, rtol=1e-5)  # fp32


def test_it_trains_resumes_and_loads_with_the_library_as_it_is(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    train(tmp_path / "whole", tiny_checkpoint, tiny_data, max_steps=6, schedule="constant")
    train(tmp_path / "out", tiny_checkpoint, tiny_data, max_steps=3, schedule="constant")
    run = train(tmp_path / "out", tiny_checkpoint, tiny_data, max_steps=6, schedule="constant", resume=True)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]
    assert checkpoints(tmp_path / "out")[-1].name == "step-000006"
    rows = [line.split(",") for line in (tmp_path / "out/metrics.csv").read_text().splitlines()[1:]]
    losses = [float(row[3]) for row in rows]
    assert losses[-1] < losses[0] - 0.1
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    load_ia3(model, tmp_path / "out")
    with torch.no_grad():
        total = sum(
            model(**run.val_set.micro_batch([index], run.fabric.device)) for index in range(len(run.val_set))
        ) / sum(run.val_set.label_counts)
    assert float(total) == pytest.approx(float(rows[-1][4]), rel=1e-5)


def test_the_example_in_contributing_is_this_one() -> None:
    story = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    source = Path(__file__).read_text("utf-8")
    for piece in ("class IA3Linear", "def apply_ia3", "def save_ia3", "def load_ia3"):
        code = source[source.index(piece) :].split("\n\n\n")[0]
        assert code in story, piece


def test_a_finetune_script_is_short() -> None:
    for script in (ROOT / "finetune").glob("*.py"):
        assert len(script.read_text("utf-8").splitlines()) < 80, script
    for script in (ROOT / "generate").glob("*.py"):
        assert len(script.read_text("utf-8").splitlines()) < 60, script
