"""Plot the metrics.csv of one or several runs."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lit_llama.errors import UserError
from lit_llama.storage.files import atomic_write, read_text

# told apart by color-blind readers, too (Okabe and Ito)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PANELS = ("learning_rate", "grad_norm", "tokens_per_second")  # beside the loss


def plot_metrics(runs: Sequence[Path], out: Path) -> list[Path]:
    """Plot the metrics of run directories as PNG and SVG; equal metrics give equal bytes."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10, 5.5), layout="constrained")
    panels = figure.subplot_mosaic([["loss", name] for name in PANELS], sharex=True)
    for number, run in enumerate(runs):
        metrics = read_metrics(run / "metrics.csv")
        # a running mean over 5% of the steps, as single steps are noisy
        window = np.ones(len(metrics["step"]) // 20 | 1)
        mean = {k: np.convolve(v, window / len(window), "valid") for k, v in metrics.items()}
        color = COLORS[number % len(COLORS)]
        for name, axes in panels.items():
            axes.plot(metrics["step"], metrics[name], color=color, linewidth=0.6, alpha=0.4)
            axes.plot(mean["step"], mean[name], color=color, label=run)
            axes.set(ylabel=name.replace("_", " "))
        validated = ~np.isnan(metrics["val_loss"])
        steps, losses = metrics["step"][validated], metrics["val_loss"][validated]
        panels["loss"].plot(steps, losses, "o--", color=color, label="    validation")
    panels["loss"].set(ylabel="loss (nats per token)")
    panels["loss"].legend()
    panels["tokens_per_second"].set_ylim(bottom=0)
    files = [out.with_suffix(".png"), out.with_suffix(".svg")]
    for file in files:
        # without a salt, the ids in an SVG are random
        with matplotlib.rc_context({"svg.hashsalt": "lit_llama"}), atomic_write(file) as temporary:
            figure.savefig(temporary, format=file.suffix[1:], dpi=150, metadata={"Date": None})
    return files


def read_metrics(file: Path) -> dict[str, np.ndarray]:
    """Read the plotted columns of a metrics.csv; an empty field is nan."""
    text = read_text(file, hint=". Pass the --out_dir of a finetuning run")
    columns = {}
    try:
        rows = list(csv.DictReader(text.splitlines()))
        for name in ("step", "loss", "val_loss", *PANELS):
            columns[name] = np.array([float(row[name] or "nan") for row in rows])
    except (KeyError, ValueError, csv.Error):
        rows = []
    if not rows:
        raise UserError(f"{file}: not the metrics of a run with at least one step")
    return columns
