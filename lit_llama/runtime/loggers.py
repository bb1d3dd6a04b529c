"""Log metrics to metrics.csv and, with `--logger`, to TensorBoard, W&B or MLflow."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric import Fabric
from lightning.fabric.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from lit_llama.errors import UserError
from lit_llama.runtime.plots import plot_metrics
from lit_llama.storage.files import atomic_write, read_text

if TYPE_CHECKING:
    from lit_llama.storage.run_folder import Progress

METRICS = ("step", "samples", "tokens", "loss", "val_loss", "learning_rate", "grad_norm")
METRICS += ("tokens_per_second", "peak_memory_bytes")


def check_logger(name: str | None) -> None:
    """Raise UserError if the logger is not installed."""
    if name and find_spec(name) is None:
        fix = f"pip install -c constraints.txt -e '.[{name}]'"
        raise UserError(f"--logger {name}: not installed. Install it: {fix}")


def start_metrics(file: Path, first_step: int) -> None:
    """Create metrics.csv; if a run is resumed after `first_step`, keep the rows up to it."""
    rows = read_text(file).splitlines()[1:] if first_step and file.is_file() else []
    # a killed run may have written part of its last row
    rows = [row for row in rows if row.count(",") == len(METRICS) - 1]
    kept = [row for row in rows if int(row.partition(",")[0]) <= first_step]
    with atomic_write(file) as temporary:
        temporary.write_text("\n".join([",".join(METRICS), *kept, ""]), "utf-8")


@contextmanager
def metrics_logger(
    fabric: Fabric, out_dir: Path, name: str | None, flags: dict[str, Any], progress: "Progress"
) -> Iterator[Callable[[dict[str, float | None]], None]]:
    """Yield a function that logs one step's metrics (rank 0); plot all steps at the end."""
    logger = None

    def log_step(values: dict[str, float | None]) -> None:
        nonlocal logger
        row = [values[column] for column in METRICS]
        row = ["" if x is None else f"{x:.8g}" if isinstance(x, float) else str(x) for x in row]
        with (out_dir / "metrics.csv").open("a", encoding="utf-8") as file:
            file.write(",".join(row) + "\n")
        logged = {column: values[column] for column in METRICS[3:] if values[column] is not None}
        if logger:
            active, logger = logger, None  # a logger that fails is not asked again
            with warn_on_error(f"--logger {name}: failed, the run continues without it"):
                active.log_metrics(logged, values["step"])
                active.save()
                logger = active

    if not fabric.is_global_zero:
        yield lambda values: None
        return
    if name:
        with warn_on_error(f"--logger {name}: cannot start, the run continues without it"):
            logger = open_logger(name, out_dir, flags, progress)
    status = "failed"
    try:
        yield log_step
        status = "success"
    finally:
        if logger:
            with warn_on_error(f"--logger {name}: cannot be closed"):
                logger.finalize(status)
        if status == "success" or sys.exc_info()[0] is SystemExit:  # stopped by a signal
            with warn_on_error("metrics.png cannot be drawn"):
                plot_metrics([out_dir], out_dir / "metrics.png")


@contextmanager
def warn_on_error(problem: str) -> Iterator[None]:
    """Print an exception as one line on stderr and continue."""
    try:
        yield
    except Exception as error:
        print(UserError(f"{problem} ({error})"), file=sys.stderr, flush=True)


def open_logger(name: str, out_dir: Path, flags: dict[str, Any], progress: "Progress") -> Logger:
    """Start the logger's run, or resume the one whose id is in out_dir/<name>_run_id.txt."""
    step, val_loss = progress.step, progress.first_val_loss
    first = {"val_loss": val_loss} if step == 0 and val_loss is not None else None
    if name == "tensorboard":
        # hides the steps that a killed run logged after its last checkpoint
        logger = TensorBoardLogger(out_dir, "", name, purge_step=step and step + 1)
        if step == 0:
            # TensorBoard shows flags beside a metric; None: Lightning's placeholder
            logger.log_hyperparams(flags, first, step)
        return logger
    id_file = out_dir / f"{name}_run_id.txt"
    run_id = read_text(id_file).strip() if id_file.is_file() else None
    title = "/".join(out_dir.resolve().parts[-2:])
    if name == "wandb":
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")  # else it waits for a lost server
        logger = WandbLogger(title, out_dir, project="lit-llama", id=run_id)
    else:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")  # else it retries for minutes
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # without a server
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (out_dir.resolve() / "mlruns").as_uri()
        logger = MLFlowLogger("lit-llama", title, uri, run_id=run_id)
    if run_id is None:
        logger.log_hyperparams(flags)
    if first:
        logger.log_metrics(first, step)
    id_file.write_text(f"{logger.version}\n", "utf-8")
    return logger
