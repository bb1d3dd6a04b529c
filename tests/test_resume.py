"""Runs that are killed, stopped, out of disk space or incompatible with their checkpoint."""

import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script
from safetensors.torch import load_file

from lit_llama import UserError, training
from lit_llama.runtime import cli
from lit_llama.runtime.args import RunArgs, TrainArgs
from lit_llama.storage.run_folder import Progress, checkpoints, flatten, prune

RECIPE = "--precision 32-true --train.kernels [short_attention] "
RECIPE += "--train.batch_size 8 --train.max_steps 200 --train.epochs 50 "
RECIPE += "--train.learning_rate 1e-2 --train.save_interval 1 --train.eval_interval 40"
FLAGS = f"{RECIPE} --lora.dropout 0.1".split()

# Imports once, then forks a process for each attempt: the script in it starts at once.
ATTEMPTS = """
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from conftest import load_script
import lit_llama.training
from lit_llama.runtime import cli
from lit_llama.storage import files

script, how, out, *flags = sys.argv[1:]
rng = random.Random(how)
main = load_script(script).main
statuses = []

def attempt(number, fatal_write):
    fsync, calls = files._fsync, [0]
    def dying_fsync(*paths):
        calls[0] += ".tmp-" in paths[-1].name
        if calls[0] == fatal_write:
            os.kill(os.getpid(), signal.SIGKILL)  # everything is written, nothing is renamed yet
        fsync(*paths)
    files._fsync = dying_fsync
    resume = ["--resume"] if os.path.exists(out + "/config.yaml") else []
    sys.argv = [script, "--out_dir", out, *flags, *resume]
    cli.run(main)

def newest():
    return max([int(name[5:]) for name in os.listdir(out) if name.startswith("step-")], default=0)

os.makedirs(out)
number = 0
while True:
    in_write = how == "SIGKILL" and number < 6
    child = os.fork()
    if child == 0:
        status = 1
        try:
            attempt(number, number + 5 if in_write else 0)
            status = 0
        except SystemExit as ended:
            status = ended.code
        finally:
            sys.stdout.flush()
            os._exit(status)
    if how != "none" and number < {kills} and not in_write:
        goal = newest() + rng.randint(0, 5)
        waited = time.monotonic()
        while newest() < goal and time.monotonic() < waited + 20:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4 if goal == newest() else 0.02))
        os.kill(child, getattr(signal, how))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    statuses.append(status)
    number += 1
    if status == 0:
        break
    if status not in (-signal.SIGKILL, -signal.SIGTERM, 143):
        sys.exit(f"unexpected status {{status}} after {{statuses}}")
print("statuses", statuses)
"""


def run_with_attempts(
    how: str, out_dir: Path, checkpoint: Path, data: Path, kills: int = 8
) -> tuple[list[int], str]:
    """Run finetune/lora.py to its end, killed `kills` times; return exit statuses and output."""
    code = textwrap.dedent(ATTEMPTS).format(tests=str(ROOT / "tests"), kills=kills)
    flags = ["--checkpoint_dir", checkpoint, "--data_dir", data, *FLAGS]
    command = [sys.executable, "-c", code, "finetune/lora.py", how, str(out_dir), *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("statuses")[2]), done.stdout


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_checkpoint: Path, tiny_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert run_with_attempts("none", folder, tiny_checkpoint, tiny_data)[0] == [0]
    return folder


def rows_of(out_dir: Path) -> list[list[str]]:
    """metrics.csv without what depends on the machine."""
    with (out_dir / "metrics.csv").open(newline="") as file:
        return [row[:7] for row in csv.reader(file)]


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_killed_at_random_moments_and_resumed_it_ends_as_if_nothing_had_happened(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, uninterrupted: Path, how: str
) -> None:
    statuses, printed = run_with_attempts(how, tmp_path / "out", tiny_checkpoint, tiny_data)
    killed = [status for status in statuses if status != 0]
    assert len(killed) == 8
    if how == "SIGTERM":
        assert killed.count(143) >= 4  # the others came before the first step
        assert printed.count("stopped by SIGTERM after step") == killed.count(143)
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert rows_of(tmp_path / "out") == rows_of(uninterrupted)
    assert [row[0] for row in rows_of(tmp_path / "out")] == [
        "step",
        *(str(n) for n in range(1, 201)),
    ]
    assert not list((tmp_path / "out").glob(".*"))


def kill_campaign(
    root: Path, checkpoint: Path, data: Path, kills: int
) -> dict[str, tuple[int, int]]:
    """For tests/faults.py: signal -> number of kills, bytes of result and metrics changed."""
    assert run_with_attempts("none", root / "whole", checkpoint, data)[0] == [0]
    results = {}
    for how in ("SIGKILL", "SIGTERM"):
        statuses, _ = run_with_attempts(how, root / how, checkpoint, data, kills)
        weights = [
            (root / out / "adapter_model.safetensors").read_bytes() for out in (how, "whole")
        ]
        lost = sum(one != two for one, two in zip(*weights, strict=True))
        lost += sum(
            one != two
            for one, two in zip(rows_of(root / how), rows_of(root / "whole"), strict=True)
        )
        results[how] = (sum(status != 0 for status in statuses), lost)
    return results


def finetune(
    out_dir: Path, checkpoint: Path, data: Path, script: str = "finetune/lora.py", **more
) -> None:
    recipe = dict(batch_size=8, max_steps=3, learning_rate=1e-2, save_interval=1)
    train = TrainArgs(**(recipe | more.pop("train", {})))
    run = dict(checkpoint_dir=checkpoint, data_dir=data, precision="32-true", seed=7)
    main = load_script(script).main
    main(RunArgs(out_dir, **(run | more)), train=train)


def test_ctrl_c_ends_with_130_after_a_checkpoint(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, monkeypatch, capsys
) -> None:
    handler = signal.getsignal(signal.SIGINT)  # a shell's background job ignores SIGINT
    original = training.train_step

    def interrupted(*args) -> tuple[float, float]:
        if args[7] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(training, "train_step", interrupted)
    with pytest.raises(SystemExit) as ended:
        finetune(tmp_path / "out", tiny_checkpoint, tiny_data, train=dict(save_interval=100))
    assert ended.value.code == 130
    printed = capsys.readouterr()
    assert "stopped by SIGINT after step 2. Resume with: python " in printed.out
    assert "SIGINT: finishing this step" in printed.err
    assert [folder.name for folder in checkpoints(tmp_path / "out")] == ["step-000002"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_full_disk_is_one_line_and_the_checkpoint_before_still_works(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, monkeypatch, capsys
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    finetune(whole, tiny_checkpoint, tiny_data)
    finetune(out, tiny_checkpoint, tiny_data, train=dict(max_steps=1))
    before = {path: path.read_bytes() for path in (out / "step-000001").iterdir()}
    flags = f"--out_dir {out} --checkpoint_dir {tiny_checkpoint} --data_dir {tiny_data} --resume"
    flags += " --precision 32-true --seed 7 --train.batch_size 8 --train.max_steps 3"
    flags += " --train.learning_rate 1e-2 --train.save_interval 1"
    monkeypatch.setattr(sys, "argv", ["finetune/lora.py", *flags.split()])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # room for config.yaml and metrics.csv, not for a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        with pytest.raises(SystemExit) as ended:
            cli.run(load_script("finetune/lora.py").main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "cannot be written" in line
    assert [folder.name for folder in checkpoints(out)] == ["step-000001"]
    assert {path: path.read_bytes() for path in (out / "step-000001").iterdir()} == before
    assert not list(out.glob(".*"))
    cli.run(load_script("finetune/lora.py").main)
    one, two = (
        load_file(folder / "step-000003/adapter_model.safetensors") for folder in (out, whole)
    )
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert [row[0] for row in rows_of(out)] == ["step", "1", "2", "3"]


def test_half_a_row_of_metrics_is_dropped(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    finetune(tmp_path / "out", tiny_checkpoint, tiny_data, train=dict(max_steps=2))
    with (tmp_path / "out/metrics.csv").open("a") as file:
        file.write("1,8,12")  # of a row for step 1234, say
    finetune(tmp_path / "out", tiny_checkpoint, tiny_data, resume=True)
    assert [row[0] for row in rows_of(tmp_path / "out")] == ["step", "1", "2", "3"]


def test_the_best_checkpoint_stays_and_every_checkpoint_can_be_used(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    # good for a few steps, then far too high a learning rate
    recipe = dict(
        max_steps=8,
        eval_interval=1,
        keep_last=1,
        learning_rate=0.3,
        warmup_steps=4,
        schedule="constant",
    )
    finetune(tmp_path / "out", tiny_checkpoint, tiny_data, train=recipe)
    losses = {int(row[0]): float(row[4]) for row in rows_of(tmp_path / "out")[1:]}
    best = min(losses, key=losses.get)
    assert best < 8
    names = [folder.name for folder in checkpoints(tmp_path / "out")]
    assert names == [f"step-{best:06}", "step-000008"]
    generate = load_script("generate/lora.py")
    for name in names:
        prompt = generate.AnswerArgs(prompt="Hello", max_new_tokens=3)
        generate.main(prompt, lora_path=[tmp_path / "out" / name])


def test_more_epochs_leave_no_sample_out(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, monkeypatch
) -> None:
    """The last step of a finished run was a short one: 50 samples in steps of 16."""
    original, seen = training.train_step, []

    def noted(*args) -> tuple[float, float]:
        seen.extend(args[4])
        return original(*args)

    monkeypatch.setattr(training, "train_step", noted)
    for epochs in (1, 2):
        recipe = dict(batch_size=16, max_steps=None, epochs=epochs)
        finetune(tmp_path / "out", tiny_checkpoint, tiny_data, train=recipe, resume=epochs > 1)
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50))
    assert [row[1] for row in rows_of(tmp_path / "out")[1:]] == ["16", "16", "16", "2"] * 2


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 1_000_000):
        (tmp_path / f"step-{step:06}").mkdir()
    prune(tmp_path, keep_last=2, best_step=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == [
        "step-000002",
        "step-000004",
        "step-1000000",
    ]


def test_partial_writes_of_a_killed_run_are_removed(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    out = tmp_path / "out"
    finetune(out, tiny_checkpoint, tiny_data, train=dict(max_steps=1))
    for name in (".step-000009.tmp-3", ".metrics.csv.tmp-12", ".step-000001.old", ".git", "a.tmp"):
        (out / name).mkdir()
    finetune(out, tiny_checkpoint, tiny_data, train=dict(max_steps=2), resume=True)
    assert {path.name for path in out.iterdir() if re.search(r"\.tmp|\.old|^\.", path.name)} == {
        ".git",
        "a.tmp",
    }


def argv_of(out_dir: Path, checkpoint: Path, data: Path, *more: str) -> list[str]:
    flags = [
        "--out_dir",
        out_dir,
        "--checkpoint_dir",
        checkpoint,
        "--data_dir",
        data,
        "--precision",
        "32-true",
    ]
    recipe = ["--seed", 7, "--train.batch_size", 8, "--train.max_steps", 2]
    return ["finetune/lora.py", *map(str, [*flags, *recipe]), *more]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora.alpha", "8"], "--lora.alpha was 16 when this run began, now it is 8.0"),
        (["--seed", "8"], "--seed was 7 when this run began, now it is 8"),
        (["--train.batch_size", "16"], "--train.batch_size was 8"),
        (["--precision", "bf16-mixed"], "--precision was '32-true'"),
        (["--adapter.prompt_length", "10"], "--adapter"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_going_on_with_flags_that_do_not_fit_is_refused(
    tmp_path: Path,
    tiny_checkpoint: Path,
    tiny_data: Path,
    monkeypatch,
    capsys,
    more: list[str],
    message: str,
) -> None:
    main = load_script("finetune/lora.py").main
    monkeypatch.setattr(sys, "argv", argv_of(tmp_path / "out", tiny_checkpoint, tiny_data))
    cli.run(main)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    flags = [*more, "--resume", "--train.max_steps", "4"]
    monkeypatch.setattr(sys, "argv", argv_of(tmp_path / "out", tiny_checkpoint, tiny_data, *flags))
    with pytest.raises(SystemExit):
        cli.run(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # while what belongs to the machine, or is a choice for the rest of the run, may change
    free = [
        "--resume",
        "--train.max_steps",
        "4",
        "--train.micro_batch_tokens",
        "500",
        "--train.learning_rate",
        "1e-4",
    ]
    monkeypatch.setattr(sys, "argv", argv_of(tmp_path / "out", tiny_checkpoint, tiny_data, *free))
    cli.run(main)
    assert "resuming after step 2" in capsys.readouterr().out


def test_going_on_with_another_prepared_set_is_refused(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, records_file: Path
) -> None:
    finetune(tmp_path / "out", tiny_checkpoint, tiny_data, train=dict(max_steps=2))
    prepare = load_script("scripts/prepare_json.py").main
    prepare(records_file, tiny_checkpoint, tmp_path / "data", val_size=5)
    with pytest.raises(UserError, match=r"step-000002: trained on another tokenized dataset"):
        finetune(tmp_path / "out", tiny_checkpoint, tmp_path / "data", resume=True)


def test_random_states_are_part_of_a_checkpoint(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    finetune(tmp_path / "out", tiny_checkpoint, tiny_data)
    state = load_file(tmp_path / "out/step-000003/state-00000-00000.safetensors")
    assert torch.equal(state["rng/cpu/0@0"], torch.get_rng_state())
    written = json.loads((tmp_path / "out/step-000003/state.json").read_text())
    assert {"step", "samples", "data_sha256", "shapes"} <= written.keys()
    assert (written["step"], written["samples"]) == (3, 24)
    assert Progress.__annotations__.keys() <= written.keys()


def test_a_loss_that_is_not_finite_names_its_samples_and_leaves_what_was_good(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, monkeypatch
) -> None:
    original, seen = training.train_step, []

    def poisoned(fabric, model, optimizer, dataset, ids, train, seed, step) -> tuple[float, float]:
        seen.append(ids)
        if step == 2:
            bad = dataset.micro_batch([ids[3]], fabric.device)["input_ids"]
            model.module.embed_tokens.weight.data[bad[0]] = torch.nan  # BOS: all samples have it
        return original(fabric, model, optimizer, dataset, ids, train, seed, step)

    monkeypatch.setattr(training, "train_step", poisoned)
    with pytest.raises(UserError, match=r"step 3: loss nan .* not finite.*samples: \[") as raised:
        finetune(tmp_path / "out", tiny_checkpoint, tiny_data, train=dict(save_interval=100))
    named = re.search(r"\[[\d, ]*\]", str(raised.value))[0]
    assert sorted(json.loads(named)) == sorted(seen[2])
    monkeypatch.undo()
    assert [folder.name for folder in checkpoints(tmp_path / "out")] == ["step-000002"]
    finetune(tmp_path / "whole", tiny_checkpoint, tiny_data)
    finetune(tmp_path / "out", tiny_checkpoint, tiny_data, resume=True)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")


def test_flags_are_flattened_as_the_command_line_writes_them() -> None:
    assert flatten({"a": 1, "b": {"c": {"d": [2]}, "e": None}}) == {
        "a": 1,
        "b.c.d": [2],
        "b.e": None,
    }


def test_full_result_replaces_an_older_one(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    """Going on with a finished run, from many files to one: nothing of the old result is left."""
    out = tmp_path / "out"
    full = dict(script="finetune/full.py")
    recipe = dict(max_steps=1, learning_rate=1e-3)
    finetune(out, tiny_checkpoint, tiny_data, train=recipe, **full)
    for name in ("model-00001.safetensors", "model-00002.safetensors"):
        shutil.copy(out / "model.safetensors", out / name)
    (out / "model.safetensors.index.json").write_text("{}")
    finetune(out, tiny_checkpoint, tiny_data, train=dict(learning_rate=1e-3), resume=True, **full)
    assert {path.name for path in out.glob("model*")} == {"model.safetensors"}
