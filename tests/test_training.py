"""The loop: one recipe whatever the micro-batches; resume; metrics; validation against `transformers`."""

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import load_script
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_llama import UserError, load_model
from lit_llama.data import PreparedSet
from lit_llama.lora import LoRAConfig, LoRALinear, apply_lora, save_lora
from lit_llama.run import Run
from lit_llama.run_folder import METRICS, checkpoints
from lit_llama.training import TrainArgs, evaluate, fit, schedule

CPU = torch.device("cpu")


def train(checkpoint: Path, data: Path, out_dir: Path, resume: bool = False, dropout: float = 0.1, **recipe) -> list:
    """A LoRA run in fp32; returns the rows of metrics.csv."""
    flags = dict(devices=1, num_nodes=1, precision="32-true", seed=7, resume=resume)
    run = Run(checkpoint_dir=checkpoint, data_dir=data, out_dir=out_dir, **flags)
    lora = LoRAConfig(r=4, dropout=dropout)
    model = run.build(lambda llama: apply_lora(llama, lora))
    fit(run, model, TrainArgs(**recipe), lambda folder, tensors: save_lora(dict(tensors), folder, lora))
    return read_metrics(out_dir)


def read_metrics(out_dir: Path) -> list[dict[str, str]]:
    with (out_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


RECIPE = dict(batch_size=24, max_steps=10, learning_rate=1e-2, warmup_steps=2)


def test_losses_are_the_same_for_any_micro_batch_size(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path) -> None:
    """With dropout too, and with steps that cross from one epoch into the next."""
    runs = {
        tokens: train(tiny_checkpoint, tiny_data, tmp_path / str(tokens), micro_batch_tokens=tokens, **RECIPE)
        for tokens in (512, 2048, 8192)
    }
    losses = column(runs[512], "loss")
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
    for rows in runs.values():
        torch.testing.assert_close(column(rows, "loss"), losses, atol=1e-4, rtol=0)
        torch.testing.assert_close(column(rows, "grad_norm"), column(runs[512], "grad_norm"), atol=0, rtol=1e-3)
        assert column(rows, "tokens") == column(runs[512], "tokens")


def test_gradients_of_a_micro_batch_are_those_of_its_samples_alone(tiny_checkpoint: Path, tiny_data: Path) -> None:
    data = PreparedSet(tiny_data / "train.safetensors")
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
    flags = dict(devices=1, num_nodes=1, precision="32-true", seed=7, resume=False)
    run = Run(checkpoint_dir=tiny_checkpoint, data_dir=tiny_data, out_dir=tmp_path / "out", **flags)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    data, start, total, count = run.val_set, 0, 0.0, 0
    for length, labelled in zip(data.lengths, data.label_counts, strict=True):
        ids = data.tokens[start : start + length].long()[None]
        labels = ids.clone()
        labels[:, : length - labelled] = -100
        with torch.no_grad():
            total += float(theirs(ids, labels=labels).loss) * labelled
        start, count = start + length, count + labelled
    actual = evaluate(run, run.build(lambda llama: None), TrainArgs(micro_batch_tokens=300))
    assert actual == pytest.approx(total / count, rel=1e-5)  # fp32


def test_metrics_have_a_row_a_step_and_count_samples_and_tokens(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    rows = train(tiny_checkpoint, tiny_data, tmp_path, batch_size=16, epochs=1, eval_interval=2, learning_rate=1e-3)
    assert ",".join(rows[0]) == METRICS
    assert column(rows, "step") == [1, 2, 3, 4]
    assert column(rows, "samples") == [16, 16, 16, 2]  # 50 samples
    assert sum(column(rows, "tokens")) == len(PreparedSet(tiny_data / "train.safetensors").tokens)
    assert [bool(row["val_loss"]) for row in rows] == [False, True, False, True]
    assert all(float(row["tokens_per_second"]) > 0 and int(row["peak_memory_bytes"]) > 10**6 for row in rows)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path) -> None:
    recipe = dict(batch_size=16, learning_rate=1e-2, schedule="constant", warmup_steps=1, save_interval=3)
    whole = train(tiny_checkpoint, tiny_data, tmp_path / "whole", max_steps=8, **recipe)
    train(tiny_checkpoint, tiny_data, tmp_path / "parts", max_steps=5, **recipe)
    # as if killed between a checkpoint and the next: the newest one is not whole, its rows are there
    (tmp_path / "parts/step-000005").rename(tmp_path / "parts/.step-000005.tmp-1")
    rows = train(tiny_checkpoint, tiny_data, tmp_path / "parts", resume=True, max_steps=8, **recipe)
    assert column(rows, "step") == list(range(1, 9))
    assert column(rows, "loss") == column(whole, "loss")
    loras = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("parts", "whole")]
    assert all(torch.equal(tensor, loras[1][name]) for name, tensor in loras[0].items())


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
    train(tiny_checkpoint, tiny_data, tmp_path, batch_size=16, max_steps=5, save_interval=1, keep_last=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000004", "step-000005"]
    for name in ("step-1000000", "step-abc", ".step-000009.tmp-3"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in checkpoints(tmp_path)][1:] == ["step-000005", "step-1000000"]


def test_a_checkpoint_of_another_rank_is_refused(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path) -> None:
    train(tiny_checkpoint, tiny_data, tmp_path, batch_size=16, max_steps=1)
    flags = dict(devices=1, num_nodes=1, precision="32-true", seed=7, resume=True)
    run = Run(checkpoint_dir=tiny_checkpoint, data_dir=tiny_data, out_dir=tmp_path, **flags)
    model = run.build(lambda llama: apply_lora(llama, LoRAConfig(r=2)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"step-000001.*config\.yaml"):
        fit(run, model, TrainArgs(max_steps=2), lambda folder, tensors: None)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path) -> None:
    flags = dict(devices=1, num_nodes=1, precision="32-true", seed=7, resume=False)
    run = Run(checkpoint_dir=tiny_checkpoint, data_dir=tiny_data, out_dir=tmp_path / "out", **flags)
    model = run.build(lambda llama: apply_lora(llama, LoRAConfig()))
    model.module.norm.weight.data[0] = torch.nan
    before = [parameter.clone() for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(UserError, match=r"step 1: loss nan .*learning_rate.*samples \["):
        fit(run, model, TrainArgs(batch_size=4), lambda folder, tensors: None)
    for old, new in zip(before, (p for p in model.parameters() if p.requires_grad), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_schedule_matches_torchs(kind: str) -> None:
    warmup, num_steps = 4, 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    if kind == "cosine":
        rest = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps - warmup)
    else:
        rest = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    whole = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, rest], [warmup])
    for step in range(num_steps):
        assert schedule(kind, step, warmup, num_steps) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        whole.step()


def test_bf16_run_keeps_the_trained_weights_in_fp32(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path) -> None:
    main = load_script("finetune/lora.py").main
    recipe = TrainArgs(batch_size=16, max_steps=12, learning_rate=1e-2, warmup_steps=0)
    main(tmp_path / "out", train=recipe, checkpoint_dir=tiny_checkpoint, data_dir=tiny_data)
    rows = read_metrics(tmp_path / "out")
    fp32 = train(tiny_checkpoint, tiny_data, tmp_path / "fp32", dropout=0.05, **vars(recipe))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.5
    # the same curve up to bf16's 8 bits
    torch.testing.assert_close(column(rows, "loss")[0], column(fp32, "loss")[0], atol=0, rtol=2e-2)
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_checkpoint)


@pytest.mark.parametrize(
    "values",
    [
        dict(batch_size=0),
        dict(micro_batch_tokens=0),
        dict(max_steps=0),
        dict(learning_rate=-1.0),
        dict(learning_rate=float("nan")),
        dict(beta2=1.0),
        dict(schedule="linear"),
        dict(save_interval=0),
    ],
    ids=str,
)
def test_recipes_out_of_range_are_refused(values: dict) -> None:
    with pytest.raises(UserError, match=f"--train.{next(iter(values))}"):
        TrainArgs(**values)


def test_a_run_killed_before_its_lora_was_written_gets_it(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, monkeypatch
) -> None:
    """What was trained is written before the last checkpoint, so that a resume finds work left to do."""
    recipe = dict(batch_size=16, max_steps=3, save_interval=2, learning_rate=1e-2)

    def killed(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"{__name__}.save_lora", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_checkpoint, tiny_data, tmp_path, **recipe)
    monkeypatch.undo()
    rows = train(tiny_checkpoint, tiny_data, tmp_path, resume=True, **recipe)
    assert column(rows, "step") == [1, 2, 3]
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_any_seed_and_a_run_without_validation(tmp_path: Path, tiny_checkpoint: Path, records_file: Path) -> None:
    load_script("scripts/prepare_json.py").main(records_file, tiny_checkpoint, tmp_path / "data", val_size=0)
    main, recipe = load_script("finetune/lora.py").main, TrainArgs(batch_size=16, max_steps=1)
    flags = dict(checkpoint_dir=tiny_checkpoint, data_dir=tmp_path / "data", seed=99_999_999_999_999)
    main(tmp_path / "out", train=recipe, **flags)
    assert read_metrics(tmp_path / "out")[0]["val_loss"] == ""


def test_a_warm_up_in_epochs_counts_steps(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path) -> None:
    recipe = dict(batch_size=16, max_steps=6, learning_rate=1e-3, schedule="constant", warmup_epochs=0.5)
    rows = train(tiny_checkpoint, tiny_data, tmp_path, **recipe)  # half of 50 samples are two steps
    assert column(rows, "learning_rate") == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])


def test_validation_is_without_dropout_and_training_with_it(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    run = Run(checkpoint_dir=tiny_checkpoint, data_dir=tiny_data, out_dir=tmp_path, precision="32-true")
    model = run.build(lambda llama: apply_lora(llama, LoRAConfig(dropout=0.5)))
    loras = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for lora in loras:
        torch.nn.init.normal_(lora.lora_B.weight)
    loss = evaluate(run, model, TrainArgs())
    assert all(lora.training for lora in loras)
    for lora in loras:
        lora.dropout = 0.0
    assert evaluate(run, model, TrainArgs()) == loss


def test_loraplus_reaches_the_optimizer(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path) -> None:
    """Adam's first step moves a weight by its learning rate, and B starts at zero."""
    recipe = TrainArgs(batch_size=16, max_steps=1, learning_rate=1e-3)
    flags = dict(checkpoint_dir=tiny_checkpoint, data_dir=tiny_data, precision="32-true")
    load_script("finetune/lora.py").main(tmp_path, LoRAConfig(loraplus_lr_ratio=16), train=recipe, **flags)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    moved = torch.cat([tensor.abs().flatten() for name, tensor in tensors.items() if ".lora_B." in name])
    assert float(moved.median()) == pytest.approx(16e-3, rel=1e-3)
