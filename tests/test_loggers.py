"""Metrics in metrics.csv and with --logger: TensorBoard, W&B and MLflow by their own readers."""

import csv
import json
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT, load_script

from lit_llama.errors import UserError
from lit_llama.runtime import cli, loggers
from lit_llama.runtime.loggers import METRICS, check_logger, metrics_logger, start_metrics
from lit_llama.storage.run_folder import Progress

LOGGED = list(METRICS[3:])
FLAGS = {"seed": 1337, "resume": False, "quantize": None, "lora": {"r": 8, "targets": ["q_proj"]}}
FIRST_VAL_LOSS = 2.75
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
def out_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "lora/out"
    folder.mkdir(parents=True)
    return folder


def values_of(step: int) -> dict[str, float | None]:
    """Metrics of a step, different each time; with a validation at every second step."""
    row = np.random.default_rng().uniform(0.5, 2, 5).tolist()
    loss, val_loss, learning_rate, grad_norm, speed = row
    return {
        "step": step,
        "samples": 16,
        "tokens": 1000,
        "loss": loss,
        "val_loss": None if step % 2 else val_loss,
        "learning_rate": learning_rate * 1e-4,
        "grad_norm": grad_norm,
        "tokens_per_second": speed * 1000,
        "peak_memory_bytes": 10**9 + step,
    }


def log_run(
    out_dir: Path, after: int, last: int, logger: str | None, error: BaseException | None = None
) -> None:
    """Log the steps `after` + 1 to `last` as a run does that begins or is resumed there."""
    start_metrics(out_dir / "metrics.csv", after)
    progress = Progress(step=after, first_val_loss=FIRST_VAL_LOSS)
    fabric = SimpleNamespace(is_global_zero=True)
    with metrics_logger(fabric, out_dir, logger, FLAGS, progress) as log_step:
        for step in range(after + 1, last + 1):
            log_step(values_of(step))
        if error is not None:
            raise error
    if logger == "wandb":
        sys.modules["wandb"].finish()  # as at the end of a process


def read_metrics(out_dir: Path) -> list[dict[str, str]]:
    with (out_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def expected(out_dir: Path) -> Curves:
    """metrics.csv, and the validation before the first step, which is not in it."""
    rows = read_metrics(out_dir)
    curves = {
        name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in LOGGED
    }
    curves["val_loss"].insert(0, (0, FIRST_VAL_LOSS))
    return curves


def of_tensorboard(out_dir: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out_dir / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def wandb_records(out_dir: Path) -> list:
    """Read the `run-*.wandb` of all sessions, oldest first; W&B's own process writes the end."""
    files = (out_dir / "wandb").glob("offline-run-*/run-*.wandb")
    records = []
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        deadline = time.monotonic() + 30
        session = session_records(file.read_bytes())
        while not (session and session[-1].HasField("exit")):
            assert time.monotonic() < deadline, f"{file} is not complete"
            session = session_records(file.read_bytes())
        records += session
    return records


def session_records(content: bytes) -> list:
    """Decode log records of LevelDB's format, each a protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, record = [], b""
    at = 7  # after the file's header
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # a record's header does not cross the border of two blocks
            at += left
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])  # after the checksum
        at += 7
        if at + length > len(content):
            break
        record += content[at : at + length]
        at += length
        if kind in (1, 4):  # complete, or the last part
            records.append(Record.FromString(record))
            record = b""
    return records


def of_wandb(out_dir: Path) -> Curves:
    curves: Curves = {}
    for record in wandb_records(out_dir):
        items = record.history.item
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        for name in set(LOGGED) & set(row):
            curves.setdefault(name, []).append((row["trainer/global_step"], row[name]))
    return curves


def of_mlflow(out_dir: Path) -> Curves:
    client, run_id = mlflow_run(out_dir)
    curves: Curves = {}
    for name in client.get_run(run_id).data.metrics:
        history = client.get_metric_history(run_id, name)
        curves[name] = sorted((metric.step, metric.value) for metric in history)
    return curves


def mlflow_run(out_dir: Path) -> tuple:
    from mlflow import MlflowClient

    client = MlflowClient((out_dir / "mlruns").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'lit-llama'")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run.info.run_id


def flatten(flags: dict, prefix: str = "") -> dict[str, str]:
    """As Lightning's loggers name nested flags: {"lora": {"r": 8}} -> {"lora/r": "8"}."""
    flat: dict[str, str] = {}
    for name, value in flags.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def number(text: str) -> float | str:
    """Make flags comparable: TensorBoard's numbers and booleans are floats."""
    text = {"False": "0", "True": "1"}.get(text, text)
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
    return flatten({update.key: json.loads(update.value_json) for update in updates})


def flags_of_mlflow(out_dir: Path) -> dict[str, str]:
    client, run_id = mlflow_run(out_dir)
    return client.get_run(run_id).data.params


READERS = {
    "tensorboard": (of_tensorboard, flags_of_tensorboard),
    "wandb": (of_wandb, flags_of_wandb),
    "mlflow": (of_mlflow, flags_of_mlflow),
}


def compare(actual: Curves, out_dir: Path) -> None:
    wanted = expected(out_dir)
    assert sorted(actual) == sorted(LOGGED)
    for name in LOGGED:
        steps, values = zip(*actual[name], strict=True)
        assert steps == tuple(step for step, _ in wanted[name]), name
        # TensorBoard's values are fp32, metrics.csv has eight digits
        assert values == pytest.approx([value for _, value in wanted[name]], rel=1e-6)


def test_metrics_csv_to_the_byte(out_dir: Path) -> None:
    start_metrics(out_dir / "metrics.csv", 0)
    values = [1, 16, 1000, 2.123456789, None, 1.5e-05, 0.0, 12345.678901, 12345678901]
    with metrics_logger(
        SimpleNamespace(is_global_zero=True), out_dir, None, FLAGS, Progress()
    ) as log_step:
        log_step(dict(zip(METRICS, values, strict=True)))
    assert (out_dir / "metrics.csv").read_bytes() == (
        b"step,samples,tokens,loss,val_loss,learning_rate,grad_norm,tokens_per_second,"
        b"peak_memory_bytes\n1,16,1000,2.1234568,,1.5e-05,0,12345.679,12345678901\n"
    )
    assert (out_dir / "metrics.svg").is_file()


def test_only_rank_0_writes(out_dir: Path) -> None:
    fabric = SimpleNamespace(is_global_zero=False)
    with metrics_logger(fabric, out_dir, "tensorboard", FLAGS, Progress()) as log_step:
        log_step(values_of(1))
    assert not list(out_dir.iterdir())


def test_resume_keeps_the_complete_rows_up_to_its_step(out_dir: Path) -> None:
    file = out_dir / "metrics.csv"
    log_run(out_dir, 0, 13, None)
    before = file.read_text()
    file.write_text(before + "1")  # a killed run's beginning of step 14
    start_metrics(file, 12)
    assert file.read_text() == before[: before.index("\n13,") + 1]
    start_metrics(file, 0)
    assert file.read_text() == ",".join(METRICS) + "\n"


@pytest.mark.parametrize("logger", READERS)
def test_a_logger_holds_what_metrics_csv_holds_and_resume_continues_the_same_run(
    out_dir: Path, logger: str
) -> None:
    pytest.importorskip(logger)
    curves, flags = READERS[logger]
    log_run(out_dir, 0, 3, logger)
    logged = {name: number(text) for name, text in flags(out_dir).items()}
    assert logged == {name: number(text) for name, text in flatten(FLAGS).items()}
    log_run(out_dir, 3, 5, logger)
    assert len(read_metrics(out_dir)) == 5
    compare(curves(out_dir), out_dir)
    if logger == "wandb":
        folders = (out_dir / "wandb").glob("offline-run-*")
        (run_id,) = {folder.name.rpartition("-")[2] for folder in folders}
        assert (out_dir / "wandb_run_id.txt").read_text() == f"{run_id}\n"
        (name,) = {record.run.display_name for record in wandb_records(out_dir)} - {""}
        assert name == "lora/out"


def test_steps_after_the_checkpoint_of_a_killed_run_are_not_in_tensorboard_twice(
    out_dir: Path,
) -> None:
    pytest.importorskip("tensorboard")
    log_run(out_dir, 0, 4, "tensorboard")
    log_run(out_dir, 2, 6, "tensorboard")
    compare(of_tensorboard(out_dir), out_dir)
    shutil.rmtree(out_dir / "tensorboard")
    log_run(out_dir, 0, 4, "tensorboard")
    log_run(out_dir, 0, 3, "tensorboard")  # killed before its first checkpoint
    compare(of_tensorboard(out_dir), out_dir)


def test_flags_are_in_tensorboard_without_a_validation_too(out_dir: Path) -> None:
    pytest.importorskip("tensorboard")
    fabric = SimpleNamespace(is_global_zero=True)
    with metrics_logger(fabric, out_dir, "tensorboard", FLAGS, Progress()):
        pass
    assert flags_of_tensorboard(out_dir).keys() == flatten(FLAGS).keys()


def test_a_run_that_fails_is_failed_and_draws_nothing(out_dir: Path) -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(UserError):
        log_run(out_dir, 0, 1, "mlflow", UserError("step 2: the loss is not finite"))
    client, run_id = mlflow_run(out_dir)
    assert client.get_run(run_id).info.status == "FAILED"
    assert not (out_dir / "metrics.png").exists()
    with pytest.raises(SystemExit, match="143"):  # a signal stops a run by SystemExit
        log_run(out_dir, 1, 2, None, SystemExit(143))
    assert (out_dir / "metrics.png").exists()
    log_run(out_dir, 2, 3, "mlflow")
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_logger_or_a_picture_that_fails_does_not_end_the_run(
    out_dir: Path, monkeypatch, capsys
) -> None:
    mlflow = pytest.importorskip("mlflow")
    original = mlflow.MlflowClient.log_batch

    def failing(self, *args, metrics=(), **more) -> None:
        if metrics and metrics[0].step == 2:
            raise mlflow.MlflowException("the server is gone\nand more")
        original(self, *args, metrics=metrics, **more)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", failing)
    monkeypatch.setattr(loggers, "plot_metrics", lambda runs, out: 1 / 0)
    log_run(out_dir, 0, 3, "mlflow")
    assert len(read_metrics(out_dir)) == 3
    assert [step for step, _ in of_mlflow(out_dir)["loss"]] == [1]
    logger, picture = capsys.readouterr().err.splitlines()[-2:]
    problem = "--logger mlflow: failed, the run continues without it"
    assert logger == f"{problem} (the server is gone and more)"
    assert picture == "metrics.png cannot be drawn (division by zero)"


def test_a_logger_that_cannot_start_does_not_end_the_run(out_dir: Path, capsys) -> None:
    pytest.importorskip("mlflow")
    (out_dir / "mlflow_run_id.txt").write_text("0123456789abcdef0123456789abcdef\n")
    log_run(out_dir, 0, 3, "mlflow")
    assert len(read_metrics(out_dir)) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match("--logger mlflow: cannot start, .*continues without it .*0123456789ab", line)


@pytest.mark.parametrize("name", READERS)
def test_a_missing_logger_is_one_line(monkeypatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    hint = f"not installed. Install it: pip install -c constraints.txt -e '.[{name}]'"
    with pytest.raises(UserError, match=re.escape(f"--logger {name}: {hint}")):
        check_logger(name)
    check_logger(None)


@pytest.fixture
def finetune(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, monkeypatch
) -> Callable[..., Path]:
    """A call of `finetune/lora.py` by its command line, with --out_dir in tmp_path."""
    main = load_script("finetune/lora.py").main

    def call(*flags: str) -> Path:
        words = f"--checkpoint_dir {tiny_checkpoint} --data_dir {tiny_data}"
        words += f" --out_dir {tmp_path}/lora/run --precision 32-true --train.batch_size 16"
        words += " --train.eval_interval 2 --train.learning_rate 1e-2"
        monkeypatch.setattr(sys, "argv", ["finetune/lora.py", *words.split(), *flags])
        cli.run(main)
        return tmp_path / "lora/run"

    return call


def test_a_run_logs_its_steps_and_flags(finetune, capsys, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    out_dir = finetune("--train.max_steps", "3", "--logger", "tensorboard")
    printed = capsys.readouterr().out
    first_val_loss = float(printed.partition("step 0: val loss ")[2].split()[0])
    finetune("--train.max_steps", "5", "--logger", "tensorboard", "--resume")
    assert len(read_metrics(out_dir)) == 5
    curves = of_tensorboard(out_dir)
    # printed with four digits
    assert curves["val_loss"][0] == (0, pytest.approx(first_val_loss, abs=1e-4))
    monkeypatch.setitem(globals(), "FIRST_VAL_LOSS", curves["val_loss"][0][1])
    compare(curves, out_dir)
    used = flatten(yaml.safe_load((out_dir / "config.yaml").read_text()))
    used["train/max_steps"] = "3"  # as the run began
    logged = {name: number(text) for name, text in flags_of_tensorboard(out_dir).items()}
    assert logged == {name: number(text) for name, text in used.items()}


def test_a_missing_logger_is_one_line_before_anything_is_written(
    finetune, monkeypatch, capsys, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="2"):
        finetune("--logger", "wandb")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --logger wandb: not installed")
    assert not (tmp_path / "lora").exists()


def test_without_the_flag_no_logger_is_imported() -> None:
    names = "{'tensorboard', 'wandb', 'mlflow'}"
    code = f"import sys, lit_llama.runtime.loggers; print({names} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
