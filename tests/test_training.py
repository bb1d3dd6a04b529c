"""The loop: one recipe for all micro-batch sizes; resume; metrics; loss against `transformers`."""

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import load_script
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_llama import LLaMA, UserError, load_model
from lit_llama.data import TokenizedDataset
from lit_llama.fast import use_fast_paths
from lit_llama.lora import LoRAConfig, LoRALinear, apply_lora
from lit_llama.runtime import cli
from lit_llama.runtime.args import RunArgs
from lit_llama.runtime.devices import StopSignals, setup_fabric, setup_model
from lit_llama.runtime.loggers import METRICS
from lit_llama.storage.datasets import Dataset, load_dataset
from lit_llama.storage.files import read_tensors
from lit_llama.storage.methods import METHODS
from lit_llama.storage.model_folder import empty_model
from lit_llama.storage.run_folder import Progress, checkpoints, read_flags
from lit_llama.training import (
    Schedule,
    TrainArgs,
    evaluate,
    fit,
    make_optimizer,
    train_step,
)

CPU = torch.device("cpu")


def train(
    checkpoint: Path, data: Path, out_dir: Path, resume: bool = False, dropout=0.1, **recipe
) -> list[dict[str, str]]:
    """Finetune a LoRA in fp32. Returns the rows of metrics.csv."""
    run = RunArgs(out_dir, checkpoint, data, precision="32-true", seed=7, resume=resume)
    lora, main = LoRAConfig(r=4, dropout=dropout), load_script("finetune/lora.py").main
    main(run, lora, train=TrainArgs(**recipe))
    return read_metrics(out_dir)


def start_run(
    run: RunArgs, apply: Callable[[LLaMA], None]
) -> tuple[Fabric, Dataset, _FabricModule]:
    """Do what a script does before `fit`."""
    fabric = setup_fabric(run.devices, run.num_nodes, run.precision)
    torch.manual_seed(run.seed)
    model = empty_model(run.checkpoint_dir, torch.float32)
    apply(model)
    use_fast_paths(model)
    dataset = load_dataset(run.data_dir, run.checkpoint_dir)
    return fabric, dataset, setup_model(fabric, model, run.checkpoint_dir)


def read_metrics(out_dir: Path) -> list[dict[str, str]]:
    with (out_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


RECIPE = dict(batch_size=24, max_steps=10, learning_rate=1e-2, warmup_steps=2)


def test_a_step_waits_for_the_device_once(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, monkeypatch
) -> None:
    """On a GPU, reading a number is waiting for all that comes before it."""
    run = RunArgs(tmp_path / "out", tiny_checkpoint, tiny_data, precision="32-true")
    fabric, dataset, model = start_run(run, lambda model: apply_lora(model, LoRAConfig()))
    trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
    train = TrainArgs(micro_batch_tokens=64)
    optimizer = fabric.setup_optimizers(make_optimizer(trained, train, {}))
    waits = []

    def noted(read: Callable) -> Callable:
        return lambda tensor: waits.append(read) or read(tensor)

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))
    with StopSignals(fabric) as stop:
        train_step(fabric, model, optimizer, dataset.train, list(range(12)), train, 1, 0)
        assert stop.agreed() == 0
    assert len(waits) == 1


def test_losses_are_the_same_for_any_micro_batch_size(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    """With dropout too, and with steps that cross from one epoch into the next."""
    runs = []
    for tokens in (512, 2048, 8192):
        recipe = RECIPE | dict(micro_batch_tokens=tokens)
        runs.append(train(tiny_checkpoint, tiny_data, tmp_path / str(tokens), **recipe))
    losses, norms = column(runs[0], "loss"), column(runs[0], "grad_norm")
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
    for rows in runs:
        torch.testing.assert_close(column(rows, "loss"), losses, atol=1e-4, rtol=0)
        torch.testing.assert_close(column(rows, "grad_norm"), norms, atol=0, rtol=1e-3)
        assert column(rows, "tokens") == column(runs[0], "tokens")


def test_gradients_of_a_micro_batch_are_those_of_its_samples_alone(
    tiny_checkpoint: Path, tiny_data: Path
) -> None:
    data = TokenizedDataset(read_tensors(tiny_data / "train.safetensors")[0])
    ids = [3, 17, 4, 40, 9]
    gradients = []
    for batches in ([ids], [[index] for index in ids]):
        model = load_model(tiny_checkpoint, dtype=torch.float32).requires_grad_(True).train()
        for batch in batches:
            model(**data.micro_batch(batch, CPU)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.norm() > 0
        assert (gradient - gradients[1][name]).norm() < 1e-5 * gradient.norm(), name  # fp32


def test_validation_loss_is_the_mean_over_labels_of_transformers(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    run = RunArgs(tmp_path / "out", tiny_checkpoint, tiny_data, precision="32-true")
    fabric, dataset, model = start_run(run, lambda model: None)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    data, start, total, count = dataset.val, 0, 0.0, 0
    for length, labelled in zip(data.lengths, data.label_counts, strict=True):
        ids = data.tokens[start : start + length].long()[None]
        labels = ids.clone()
        labels[:, : length - labelled] = -100
        with torch.no_grad():
            total += float(theirs(ids, labels=labels).loss) * labelled
        start, count = start + length, count + labelled
    actual = evaluate(fabric, model, data, TrainArgs(micro_batch_tokens=300))
    assert actual == pytest.approx(total / count, rel=1e-5)  # fp32


def test_metrics_have_a_row_a_step_and_count_samples_and_tokens(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    recipe = dict(batch_size=16, epochs=1, eval_interval=2, learning_rate=1e-3)
    rows = train(tiny_checkpoint, tiny_data, tmp_path, **recipe)
    assert tuple(rows[0]) == METRICS
    assert column(rows, "step") == [1, 2, 3, 4]
    assert column(rows, "samples") == [16, 16, 16, 2]  # 50 samples
    assert sum(column(rows, "tokens")) == len(load_file(tiny_data / "train.safetensors")["tokens"])
    assert [bool(row["val_loss"]) for row in rows] == [False, True, False, True]
    assert min(column(rows, "tokens_per_second")) > 0
    assert min(column(rows, "peak_memory_bytes")) > 10**6


def test_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    recipe = dict(batch_size=16, learning_rate=1e-2, schedule="constant", warmup_steps=1)
    recipe["save_interval"] = 3
    whole = train(tiny_checkpoint, tiny_data, tmp_path / "whole", max_steps=8, **recipe)
    train(tiny_checkpoint, tiny_data, tmp_path / "parts", max_steps=5, **recipe)
    # As if killed while the last checkpoint was written: its rows are there already.
    (tmp_path / "parts/step-000005").rename(tmp_path / "parts/.step-000005.tmp-1")
    rows = train(tiny_checkpoint, tiny_data, tmp_path / "parts", resume=True, max_steps=8, **recipe)
    assert column(rows, "step") == list(range(1, 9))
    assert column(rows, "loss") == column(whole, "loss")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("parts", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_resume_before_the_first_checkpoint_starts_again(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    recipe = dict(batch_size=16, max_steps=2, learning_rate=1e-2)
    first = train(tiny_checkpoint, tiny_data, tmp_path, **recipe)
    for folder in checkpoints(tmp_path):
        folder.rename(tmp_path / f".{folder.name}.tmp-1")
    again = train(tiny_checkpoint, tiny_data, tmp_path, resume=True, **recipe)
    assert column(again, "loss") == column(first, "loss")


def test_only_the_last_checkpoints_are_kept_in_order_of_their_steps(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    recipe = dict(batch_size=16, max_steps=5, save_interval=1, keep_last=2)
    train(tiny_checkpoint, tiny_data, tmp_path, **recipe)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000004", "step-000005"]
    for name in ("step-1000000", "step-abc", ".step-000009.tmp-3"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in checkpoints(tmp_path)][1:] == ["step-000005", "step-1000000"]


def test_a_checkpoint_of_another_rank_is_refused(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    """By its shapes, even if the flags are those of the run."""
    train(tiny_checkpoint, tiny_data, tmp_path, batch_size=16, max_steps=1)
    run = RunArgs(tmp_path, tiny_checkpoint, tiny_data, precision="32-true", seed=7, resume=True)
    lora = LoRAConfig(r=2)
    fabric, dataset, model = start_run(run, lambda model: apply_lora(model, lora))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    settings = {"LORA": lora}, TrainArgs(max_steps=2), run, read_flags(tmp_path)
    with pytest.raises(UserError, match=r"step-000001.*config\.yaml"):
        fit(fabric, model, dataset, *settings)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    run = RunArgs(tmp_path / "out", tiny_checkpoint, tiny_data, precision="32-true")
    fabric, dataset, model = start_run(run, lambda model: apply_lora(model, LoRAConfig()))
    model.module.norm.weight.data[0] = torch.nan
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.clone() for parameter in trained]
    with pytest.raises(UserError, match=r"step 1: loss nan .*weights are damaged.*samples: \["):
        fit(fabric, model, dataset, {"LORA": LoRAConfig()}, TrainArgs(batch_size=4), run, {})
    assert all(map(torch.equal, before, trained))


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_schedule_matches_that_of_torch(kind: str) -> None:
    warmup, num_steps = 4, 20
    train = TrainArgs(1, epochs=1, learning_rate=1.0, schedule=kind, warmup_steps=warmup)
    ours = Schedule(train, num_steps, Progress())
    assert ours.num_steps == num_steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    if kind == "cosine":
        rest = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps - warmup)
    else:
        rest = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    whole = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, rest], [warmup])
    for step in range(num_steps):
        expected = optimizer.param_groups[0]["lr"]
        group = {"ratio": 2.0}
        actual = ours.set_learning_rate(Mock(param_groups=[group]), step)
        assert actual == group["lr"] / 2 == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        whole.step()


def test_bf16_run_keeps_the_trained_weights_in_fp32(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    main = load_script("finetune/lora.py").main
    recipe = TrainArgs(batch_size=16, max_steps=12, learning_rate=1e-2, warmup_steps=0)
    main(RunArgs(tmp_path / "out", tiny_checkpoint, tiny_data), train=recipe)
    rows = read_metrics(tmp_path / "out")
    fp32 = train(tiny_checkpoint, tiny_data, tmp_path / "fp32", dropout=0.05, **vars(recipe))
    losses = column(rows, "loss")
    assert losses[-1] < losses[0] - 0.5
    # the same start up to the 8 bits of bf16
    torch.testing.assert_close(losses[0], column(fp32, "loss")[0], atol=0, rtol=2e-2)
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_checkpoint)


@pytest.mark.parametrize(
    "flag",
    [
        "batch_size=0",
        "micro_batch_tokens=0",
        "max_steps=0",
        "learning_rate=-1.0",
        "learning_rate=nan",
        "beta2=1.0",
        "schedule=linear",
        "save_interval=0",
    ],
)
def test_recipes_out_of_range_are_refused(flag: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["lora.py", f"--train.{flag}"])
    with pytest.raises(SystemExit, match="2"):
        cli.run(load_script("finetune/lora.py").main)
    assert f"--train.{flag.partition('=')[0]}" in capsys.readouterr().err


def test_a_run_killed_before_its_lora_was_written_resumes(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, monkeypatch
) -> None:
    """The result is written before the last checkpoint, so a resumed run has work left."""
    recipe = dict(batch_size=16, max_steps=3, save_interval=2, learning_rate=1e-2)

    method = METHODS["LORA"]

    def save(folder: Path, *args) -> None:
        if folder == tmp_path:
            raise KeyboardInterrupt
        method.save(folder, *args)

    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "LORA", replace(method, save=save))
        with pytest.raises(KeyboardInterrupt):
            train(tiny_checkpoint, tiny_data, tmp_path, **recipe)
    rows = train(tiny_checkpoint, tiny_data, tmp_path, resume=True, **recipe)
    assert column(rows, "step") == [1, 2, 3]
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_any_seed_and_a_run_without_validation(
    tmp_path: Path, tiny_checkpoint: Path, records_file: Path
) -> None:
    prepare = load_script("scripts/prepare_json.py").main
    prepare(records_file, tiny_checkpoint, tmp_path / "data", val_size=0)
    run = RunArgs(tmp_path / "out", tiny_checkpoint, tmp_path / "data", seed=99_999_999_999_999)
    load_script("finetune/lora.py").main(run, train=TrainArgs(batch_size=16, max_steps=1))
    assert read_metrics(tmp_path / "out")[0]["val_loss"] == ""


def test_a_warm_up_in_epochs_counts_steps(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    recipe = dict(batch_size=16, max_steps=6, learning_rate=1e-3, schedule="constant")
    rows = train(tiny_checkpoint, tiny_data, tmp_path, warmup_epochs=0.5, **recipe)
    # half of 50 samples are two steps
    assert column(rows, "learning_rate") == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])


def test_validation_is_without_dropout_and_training_with_it(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    run = RunArgs(tmp_path, tiny_checkpoint, tiny_data, precision="32-true")
    lora = LoRAConfig(dropout=0.5)
    fabric, dataset, model = start_run(run, lambda model: apply_lora(model, lora))
    loras = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for layer in loras:
        torch.nn.init.normal_(layer.lora_B.weight)
    loss = evaluate(fabric, model, dataset.val, TrainArgs())
    assert all(layer.training for layer in loras)
    for layer in loras:
        layer.dropout = 0.0
    assert evaluate(fabric, model, dataset.val, TrainArgs()) == loss


def test_loraplus_reaches_the_optimizer(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    """Adam's first step moves a weight by its learning rate, and B starts at zero."""
    run = RunArgs(tmp_path, tiny_checkpoint, tiny_data, precision="32-true")
    recipe = TrainArgs(batch_size=16, max_steps=1, learning_rate=1e-3)
    load_script("finetune/lora.py").main(run, LoRAConfig(loraplus_lr_ratio=16), train=recipe)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    moved = torch.cat([t.abs().flatten() for name, t in tensors.items() if ".lora_B." in name])
    assert float(moved.median()) == pytest.approx(16e-3, rel=1e-3)
