"""Pictures of runs: each `metrics.csv` over its steps, several runs over each other."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lit_llama.errors import UserError
from lit_llama.files import read_text, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# told apart by colour-blind readers too (Okabe and Ito, jfly.uni-koeln.de/color, without its yellow)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PANELS = {
    "loss": "loss (nats per token)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
VALIDATION = dict(linestyle="--", linewidth=1.2, marker="o", markersize=6)
SMOOTHED_FROM = 60  # steps; the running mean is over a twentieth of them


def plot_metrics(runs: Sequence[Path], out: Path) -> list[Path]:
    """Draw the `metrics.csv` of each run folder into one picture, as PNG and SVG under `out` without its suffix.

    The same metrics make the same bytes. Returns the two files; raises UserError where a `metrics.csv` is missing or
    damaged, or has no step yet.
    """
    import matplotlib

    figure = draw({label: read_metrics(run / "metrics.csv") for label, run in zip(labels(runs), runs, strict=True)})
    name = out.stem if out.suffix in (".png", ".svg") else out.name
    files = [out.with_name(f"{name}.{kind}") for kind in ("png", "svg")]
    with matplotlib.rc_context({"svg.hashsalt": "lit_llama"}):  # else a random number in each name within the SVG
        for file in files:
            kind = file.suffix[1:]
            with replacing(file) as temporary:
                figure.savefig(temporary, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return files


def read_metrics(file: Path) -> dict[str, list[float | None]]:
    """The columns of a `metrics.csv`, None where a field is empty; a row still being written is left out."""
    text = read_text(file, hint=". Give the --out_dir of a finetuning run")
    header, *rows = (line.split(",") for line in text[: text.rfind("\n") + 1].split("\n")[:-1] or [""])
    if len(set(header)) < len(header):
        raise UserError(f"{file}: no metrics of a run, a column is there twice")
    if missing := {"step", "val_loss", *PANELS} - set(header):
        raise UserError(f"{file}: no metrics of a run, there is no column {', '.join(sorted(missing))}")
    if not rows:
        raise UserError(f"{file}: no step in it yet")
    columns: dict[str, list[float | None]] = {name: [] for name in header}
    for number, row in enumerate(rows, 2):
        try:
            for name, field in zip(header, row, strict=True):
                columns[name].append(None if name == "val_loss" and field in ("", "nan") else finite(field))
        except ValueError:
            raise UserError(f"{file}, line {number}: damaged, no number in each column. Remove this line") from None
    return columns


def finite(field: str) -> float:
    """A number that can be drawn. Raises ValueError for others."""
    if not abs(value := float(field)) < 1e30:
        raise ValueError
    return value


def labels(runs: Sequence[Path]) -> list[str]:
    """The runs' names: as many of the last parts of their paths as it takes to tell them apart."""
    parts = [run.resolve().parts for run in runs]
    most = max(map(len, parts))
    count = next((n for n in range(1, most) if len({p[-n:] for p in parts}) == len(runs)), most)
    return ["/".join(p[-count:]) for p in parts]


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Each value's mean with those around it, `window` (odd) in all, fewer at both ends."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def draw(runs: dict[str, dict[str, list[float | None]]]) -> "Figure":
    """The picture of runs' columns, by label: their losses on the left, on the right what explains them."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 5.5), layout="constrained", facecolor="white")
    side = [name for name in PANELS if name != "loss"]
    panels = figure.subplot_mosaic([["loss", name] for name in side], width_ratios=(5, 4), sharex=True)
    for run, color in zip(runs.values(), cycle(COLORS), strict=False):
        steps = run["step"]
        for name, axes in panels.items():
            noisy = name != "learning_rate" and len(steps) >= SMOOTHED_FROM
            axes.plot(steps, run[name], color=color, linewidth=0.6 if noisy else 1.5, alpha=0.35 if noisy else 1)
            if noisy:
                axes.plot(steps, running_mean(run[name], len(steps) // 20 | 1), color=color, linewidth=1.8)
        at = [index for index, loss in enumerate(run["val_loss"]) if loss is not None]
        points = [steps[index] for index in at], [run["val_loss"][index] for index in at]
        panels["loss"].plot(*points, color=color, markeredgecolor="white", zorder=3, **VALIDATION)

    for name, axes in panels.items():
        axes.set_ylabel(PANELS[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.tick_params(labelbottom=name in ("loss", side[-1]))
        if name != "loss":
            axes.set_ylim(bottom=0)
    panels["loss"].set_xlabel("step")
    panels[side[-1]].set_xlabel("step")
    panels["learning_rate"].ticklabel_format(axis="y", scilimits=(-2, 2))
    panels["tokens_per_second"].yaxis.set_major_formatter("{x:,.0f}")
    figure.align_ylabels([panels[name] for name in side])
    figure.get_layout_engine().set(wspace=0.04)

    plain = COLORS[0] if len(runs) == 1 else "0.3"
    handles = [Line2D([], [], color=plain, label="training")]
    if any(loss is not None for run in runs.values() for loss in run["val_loss"]):
        handles.append(Line2D([], [], color=plain, label="validation", **VALIDATION))
    if len(runs) == 1:
        panels["loss"].set_title(*runs, loc="left", fontsize="medium")
    else:
        own = zip(runs, cycle(COLORS), strict=False)
        handles = [Line2D([], [], color=color, linewidth=3, label=label) for label, color in own] + handles
    panels["loss"].legend(handles=handles, frameon=False)
    return figure
