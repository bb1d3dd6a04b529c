"""Where a run's metrics go: metrics.csv, TensorBoard, W&B or MLflow beside it if asked for, a picture at the end."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.fabric import Fabric
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lit_llama.cli import used_flags
from lit_llama.errors import UserError
from lit_llama.files import read_text, replacing
from lit_llama.plots import plot_metrics
from lit_llama.run_folder import METRICS, Progress, add_metrics, flatten

if TYPE_CHECKING:
    from lightning.fabric.loggers import Logger

LOGGERS = {
    "tensorboard": "Look at the disk that --out_dir is on",
    "wandb": "To go without the server: WANDB_MODE=offline",
    "mlflow": "Start the server that MLFLOW_TRACKING_URI names, or unset it to write into --out_dir",
}
"""What `--logger` may be: a package's name, and what mends its most likely failure."""
PROJECT = "lit-llama"
NAMES = METRICS.split(",")
LOGGED = NAMES[NAMES.index("loss") :]


def check_logger(name: str) -> None:
    """Raise UserError for an unknown logger, or one not installed; in process 0 also where its server is out of reach.

    Nothing is written into a run's folder.
    """
    if name not in LOGGERS:
        raise UserError(f"--logger {name}: unknown. Known: {', '.join(LOGGERS)}")
    if getattr(find_spec(name), "origin", None) is None:  # a mere folder of that name is found as well
        raise UserError(f"--logger {name}: not installed. Install it: pip install -c constraints.txt -e '.[{name}]'")
    # W&B would wait for a lost server for good when a run ends, MLflow for four minutes at each step
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    if rank_zero_only.rank > 0:
        return
    try:
        if name == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
            import wandb

            wandb.login()
        elif name == "mlflow" and (uri := os.environ.get("MLFLOW_TRACKING_URI")):
            from mlflow import MlflowClient

            MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # each package has its own kinds
        raise UserError(f"--logger {name}: {reason(error)}. {LOGGERS[name]}") from None


def reason(error: Exception) -> str:
    """An exception's first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def recording(fabric: Fabric, out_dir: Path, name: str | None, progress: Progress) -> Iterator[Callable[..., None]]:
    """Inside the block, process 0 calls what this yields with a step's values, in the order of `METRICS`.

    They go into metrics.csv and to the logger of that name. At the block's end, and where a signal ends it, all steps
    are drawn into metrics.png and metrics.svg. Once the run has begun, neither logger nor picture can make it fail.
    Raises UserError where the logger cannot begin.
    """
    if not fabric.is_global_zero:
        yield lambda *values: None
        return
    logger = open_logger(name, out_dir, progress.step) if name else None

    def log(metrics: dict[str, float], step: int) -> None:
        nonlocal logger
        working, logger = logger, None
        if working:
            with failing_aloud(f"--logger {name}: has failed, the run goes on without it"):
                working.log_metrics(metrics, step)
                working.save()
                logger = working

    def record(*values: float | None) -> None:
        add_metrics(out_dir / "metrics.csv", *values)
        row = dict(zip(NAMES, values, strict=True))
        log({name: row[name] for name in LOGGED if row[name] is not None}, row["step"])

    if progress.step == 0 and progress.first_val_loss is not None:
        log({"val_loss": progress.first_val_loss}, 0)
    status = "FAILED"
    try:
        yield record
        status = "FINISHED"
    except SystemExit:  # a signal has asked to stop
        status = "KILLED"
        raise
    finally:
        if status != "FAILED":
            with failing_aloud("no picture of the metrics"):
                plot_metrics([out_dir], out_dir / "metrics.png")
        if logger:
            with failing_aloud(f"--logger {name}: not closed"):
                close(logger, status)


@contextmanager
def failing_aloud(what: str) -> Iterator[None]:
    """An error in the block is a line on stderr and goes no further."""
    try:
        yield
    except Exception as error:
        print(f"{what} ({reason(error)})", file=sys.stderr, flush=True)


def open_logger(name: str, out_dir: Path, step: int) -> "Logger":
    """Begin a run of that logger, or go on after this step with the one that has begun in `out_dir`, by its id there.

    TensorBoard's goes into `out_dir`/tensorboard. Raises UserError where the logger raises anything.
    """
    file, title = out_dir / f"{name}_run_id.txt", "/".join(out_dir.resolve().parts[-2:])
    run_id = read_text(file).strip() if file.is_file() else None
    flags = flatten(yaml.safe_load(used_flags()) or {})
    try:
        if name == "tensorboard":
            return tensorboard_logger(out_dir, step, flags)
        if name == "wandb":
            from lightning.pytorch.loggers import WandbLogger

            logger = WandbLogger(title, out_dir, project=PROJECT, id=run_id)
            logger.log_hyperparams(flags)
        else:
            from lightning.pytorch.loggers import MLFlowLogger

            uri = os.environ.get("MLFLOW_TRACKING_URI")
            if not uri:
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files without a server: only by this
                uri = (out_dir.resolve() / "mlruns").as_uri()
            logger = MLFlowLogger(PROJECT, title, uri, run_id=run_id)
            logger.experiment.update_run(logger.run_id, "RUNNING")
            if run_id is None:  # MLflow's stay as they are, though some flags may change on --resume
                logger.log_hyperparams(flags)
    except Exception as error:
        anew = f", or begin another run there: remove {file}" if run_id else ""
        raise UserError(f"--logger {name}: {reason(error)}. {LOGGERS[name]}{anew}") from None
    with replacing(file) as temporary:
        temporary.write_text(f"{logger.version}\n", "utf-8")
    return logger


def tensorboard_logger(out_dir: Path, step: int, flags: dict[str, Any]) -> "Logger":
    """Events in `out_dir`/tensorboard; those that a killed run wrote there for steps after this one are hidden."""
    from lightning.fabric.loggers import TensorBoardLogger
    from torch.utils.tensorboard.summary import hparams

    logger = TensorBoardLogger(out_dir, "", "tensorboard", purge_step=step + 1 if step else 0)
    values = {name: value if type(value) in (int, float) else str(value) for name, value in flags.items()}
    for summary in hparams(values, dict.fromkeys(LOGGED)):  # log_hyperparams would add a metric of its own
        logger.experiment.file_writer.add_summary(summary)
    return logger


def close(logger: "Logger", status: str) -> None:
    """End the logger's run as FINISHED, FAILED or KILLED; returns when everything is written or sent."""
    logger.finalize(status)
    if hasattr(logger.experiment, "finish"):  # W&B's, which finalize leaves open
        logger.experiment.finish(exit_code=int(status != "FINISHED"))
