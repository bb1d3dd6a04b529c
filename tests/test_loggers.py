"""--logger: TensorBoard, W&B and MLflow read back with their own readers, beside metrics.csv."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, load_script
from test_training import read_metrics

from lit_llama import UserError, cli
from lit_llama.run_folder import flatten

LOGGED = ["loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes"]
Curves = dict[str, list[tuple[int, float]]]  # name -> (step, value)


@pytest.fixture(autouse=True)
def no_server(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def fresh_wandb() -> None:
    """It reads the environment once."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture
def finetune(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, monkeypatch) -> object:
    """A call of `finetune/lora.py` by its command line, with --out_dir in tmp_path."""
    main = load_script("finetune/lora.py").main

    def call(*flags: str) -> Path:
        words = f"--checkpoint_dir {tiny_checkpoint} --data_dir {tiny_data} --out_dir {tmp_path}/lora/out"
        words += " --precision 32-true --train.batch_size 16 --train.eval_interval 2 --train.learning_rate 1e-2"
        monkeypatch.setattr(sys, "argv", ["finetune/lora.py", *words.split(), *flags])
        cli.run(main)
        return tmp_path / "lora/out"

    return call


def expected(out_dir: Path, first_val_loss: float) -> Curves:
    """metrics.csv, and the validation before the first step, which it does not hold."""
    rows = read_metrics(out_dir)
    curves = {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in LOGGED}
    curves["val_loss"].insert(0, (0, first_val_loss))
    return curves


def first_val_loss(printed: str) -> float:
    return float(printed.partition("step 0: val loss ")[2].split()[0])


def of_tensorboard(out_dir: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out_dir / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def wandb_records(out_dir: Path) -> list:
    """The `run-*.wandb` of each session, oldest first: log records of LevelDB's format, each a protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for file in sorted((out_dir / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime):
        session, waited = [], time.monotonic()
        # W&B's own process writes the last of it, at times when ours is through
        while not (session and session[-1].HasField("exit")) and time.monotonic() < waited + 30:
            session, content, at, record = [], file.read_bytes(), 7, b""  # after the file's header
            while at + 7 <= len(content):
                if (left := 32768 - at % 32768) < 7:  # no record's header crosses from one block into the next
                    at += left
                length, kind = struct.unpack("<HB", content[at + 4 : at + 7])  # after the checksum
                if at + 7 + length > len(content):
                    break
                record, at = record + content[at + 7 : at + 7 + length], at + 7 + length
                if kind in (1, 4):  # whole, or the last part
                    session.append(Record.FromString(record))
                    record = b""
        records += session
    return records


def of_wandb(out_dir: Path) -> Curves:
    curves: Curves = {}
    for record in wandb_records(out_dir):
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name in set(LOGGED) & set(row):
            curves.setdefault(name, []).append((row["trainer/global_step"], row[name]))
    return curves


def of_mlflow(out_dir: Path) -> Curves:
    client, run_id = mlflow_run(out_dir)
    histories = {name: client.get_metric_history(run_id, name) for name in client.get_run(run_id).data.metrics}
    return {name: sorted((metric.step, metric.value) for metric in history) for name, history in histories.items()}


def mlflow_run(out_dir: Path) -> tuple:
    from mlflow import MlflowClient

    client = MlflowClient((out_dir / "mlruns").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'lit-llama'")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run.info.run_id


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def flags_of_tensorboard(out_dir: Path) -> dict[str, str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(out_dir / "tensorboard"))
    events.Reload()
    content = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: str(getattr(value, value.WhichOneof("kind"))) for name, value in hparams.items()}


def flags_of_wandb(out_dir: Path) -> dict[str, str]:
    updates = [update for record in wandb_records(out_dir) for update in record.config.update]
    return {update.key or ".".join(update.nested_key): str(json.loads(update.value_json)) for update in updates}


def flags_of_mlflow(out_dir: Path) -> dict[str, str]:
    client, run_id = mlflow_run(out_dir)
    return client.get_run(run_id).data.params


READERS = {
    "tensorboard": (of_tensorboard, flags_of_tensorboard),
    "wandb": (of_wandb, flags_of_wandb),
    "mlflow": (of_mlflow, flags_of_mlflow),
}


def compare(actual: Curves, out_dir: Path, first_val_loss: float) -> None:
    wanted = expected(out_dir, first_val_loss)
    assert sorted(actual) == sorted(LOGGED)
    for name in LOGGED:
        steps, values = zip(*actual[name], strict=True)
        assert steps == tuple(step for step, _ in wanted[name]), name
        # the first val_loss is printed with four digits, TensorBoard's values are fp32, metrics.csv has eight digits
        assert values == pytest.approx([value for _, value in wanted[name]], rel=1e-4 if name == "val_loss" else 1e-6)


@pytest.mark.parametrize("logger", READERS)
def test_a_logger_holds_what_metrics_csv_holds_and_resume_goes_on_in_the_same_run(
    finetune, capsys, logger: str
) -> None:
    pytest.importorskip(logger)
    curves, flags = READERS[logger]
    out_dir = finetune("--train.max_steps", "3", "--logger", logger)
    start = first_val_loss(capsys.readouterr().out)
    used = flatten(yaml.safe_load((out_dir / "config.yaml").read_text()))
    assert {name: number(text) for name, text in flags(out_dir).items()} == {
        name: number(str(value)) for name, value in used.items()
    }
    finetune("--train.max_steps", "5", "--logger", logger, "--resume")
    assert len(read_metrics(out_dir)) == 5
    compare(curves(out_dir), out_dir, start)
    if logger == "wandb":
        (run_id,) = {folder.name.rpartition("-")[2] for folder in (out_dir / "wandb").glob("offline-run-*")}
        assert (out_dir / "wandb_run_id.txt").read_text() == f"{run_id}\n"
        (name,) = {record.run.display_name for record in wandb_records(out_dir)} - {""}
        assert name == "lora/out"


def test_steps_beyond_the_checkpoint_of_a_killed_run_are_not_in_tensorboard_twice(finetune, capsys) -> None:
    pytest.importorskip("tensorboard")
    out_dir = finetune("--train.max_steps", "4", "--train.save_interval", "2", "--logger", "tensorboard")
    start = first_val_loss(capsys.readouterr().out)
    shutil.rmtree(out_dir / "step-000004")
    finetune("--train.max_steps", "6", "--logger", "tensorboard", "--resume")
    compare(of_tensorboard(out_dir), out_dir, start)


def test_how_a_run_ended_is_told(finetune, monkeypatch) -> None:
    pytest.importorskip("mlflow")
    training = sys.modules["lit_llama.training"]
    original = training.train_step

    def failing(*args) -> tuple[float, float]:
        raise UserError("step 3: the loss is not finite")

    def interrupted(*args) -> tuple[float, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    def status(out_dir: Path) -> str:
        client, run_id = mlflow_run(out_dir)
        return client.get_run(run_id).info.status

    flags = ["--train.max_steps", "4", "--logger", "mlflow"]
    monkeypatch.setattr(training, "train_step", interrupted)
    with pytest.raises(SystemExit, match="130"):
        out_dir = finetune(*flags)
    out_dir = Path(sys.argv[sys.argv.index("--out_dir") + 1])
    assert status(out_dir) == "KILLED"
    picture = (out_dir / "metrics.png").read_bytes()
    monkeypatch.setattr(training, "train_step", failing)
    with pytest.raises(SystemExit, match="1"):
        finetune(*flags, "--resume")
    assert status(out_dir) == "FAILED"
    monkeypatch.setattr(training, "train_step", original)
    finetune(*flags, "--resume")
    assert status(out_dir) == "FINISHED"
    assert (out_dir / "metrics.png").read_bytes() != picture


def test_a_logger_or_a_picture_that_fails_does_not_end_the_run(finetune, monkeypatch, capsys) -> None:
    mlflow = pytest.importorskip("mlflow")
    original = mlflow.MlflowClient.log_batch

    def failing(self, *args, metrics=(), **more) -> None:
        if metrics and metrics[0].step == 2:
            raise mlflow.MlflowException("the server is gone\nand more")
        original(self, *args, metrics=metrics, **more)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", failing)
    monkeypatch.setattr("lit_llama.plots.draw", lambda runs: 1 / 0)
    out_dir = finetune("--train.max_steps", "3", "--logger", "mlflow")
    assert len(read_metrics(out_dir)) == 3
    assert [step for step, _ in of_mlflow(out_dir)["loss"]] == [1]
    printed = capsys.readouterr().err
    assert "--logger mlflow: has failed, the run goes on without it (the server is gone)\n" in printed
    assert "no picture of the metrics (division by zero)\n" in printed


def install_hint(name: str) -> str:
    return f"--logger {name}: not installed. Install it: pip install -c constraints.txt -e '.[{name}]'"


@pytest.mark.parametrize(
    ("name", "environment", "missing", "message"),
    [
        *((name, {}, True, re.escape(install_hint(name))) for name in READERS),
        ("csv", {}, False, "--logger csv: unknown. Known: tensorboard, wandb, mlflow"),
        ("wandb", {"WANDB_MODE": "online", "NETRC": "/dev/null"}, False, "No API key configured.*WANDB_MODE=offline"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, False, "127.0.0.1:9.*MLFLOW_TRACKING_URI"),
    ],
)
def test_a_logger_that_cannot_work_is_one_line_before_anything_is_written(
    finetune, monkeypatch, capsys, tmp_path: Path, name: str, environment: dict, missing: bool, message: str
) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, name, None)
    elif name in READERS:
        pytest.importorskip(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match="2"):
        finetune("--logger", name)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: (--logger {name}: )?.*{message}", line)
    assert not (tmp_path / "lora").exists()


def test_without_the_flag_no_logger_is_imported() -> None:
    code = "import sys, lit_llama.training; print({'tensorboard', 'wandb', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
