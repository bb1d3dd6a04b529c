"""Plots of metrics: what is drawn is what metrics.csv holds."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from conftest import load_script
from matplotlib.figure import Figure

from lit_llama.errors import UserError
from lit_llama.runtime import cli
from lit_llama.runtime.loggers import METRICS
from lit_llama.runtime.plots import plot_metrics

PANELS = {
    "loss": "loss (nats per token)",
    "learning_rate": "learning rate",
    "grad_norm": "grad norm",
    "tokens_per_second": "tokens per second",
}
HEADER = ",".join(METRICS)
ROW = "1,8,100,2.5,,0.1,1,10,100"


def make_run(folder: Path, steps: int = 9, seed: int = 0, every: int = 4) -> Path:
    """A run directory with random metrics, validated after every so many steps."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = [HEADER]
    for step in range(1, steps + 1):
        loss, val_loss, learning_rate, norm, speed = rng.uniform(0.5, 2, 5)
        val_loss = f"{val_loss:.8g}" if step % every == 0 else ""
        rows.append(f"{step},8,100,{loss:.8g},{val_loss},{learning_rate:.8g},{norm:.8g},")
        rows[-1] += f"{speed:.8g},1000000000"
    (folder / "metrics.csv").write_text("\n".join([*rows, ""]))
    return folder


def table(run: Path) -> np.ndarray:
    """metrics.csv by numpy, nan where a field is empty."""
    return np.genfromtxt(run / "metrics.csv", delimiter=",", names=True)


def drawn(runs: list[Path], out: Path, monkeypatch) -> dict[str, list]:
    """Plot; return each panel's lines, by its label."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw))
    )
    plot_metrics(runs, out)
    return {axes.get_ylabel(): axes.get_lines() for axes in figures[0].axes}


def test_what_is_drawn_is_what_the_files_hold(tmp_path: Path, monkeypatch) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", steps=17, seed=1)]
    panels = drawn(runs, tmp_path / "out.png", monkeypatch)
    assert sorted(panels) == sorted(PANELS.values())
    for name, title in PANELS.items():
        lines = [line for line in panels[title] if line.get_linestyle() == "-"]
        assert len(lines) == 4  # each run's steps and their running mean, here over one step
        for number, line in enumerate(lines):
            columns = table(runs[number // 2])
            points = np.stack([columns["step"], columns[name]], axis=1)
            np.testing.assert_array_equal(line.get_xydata(), points)
    validation = [line for line in panels[PANELS["loss"]] if line.get_linestyle() == "--"]
    for line, run in zip(validation, runs, strict=True):
        columns = table(run)
        points = np.stack([columns["step"], columns["val_loss"]], axis=1)
        np.testing.assert_array_equal(line.get_xydata(), points[~np.isnan(columns["val_loss"])])
    one, two = (line.get_color() for line in validation)
    assert one != two
    svg = (tmp_path / "out.svg").read_text()
    assert str(runs[0]) in svg
    assert str(runs[1]) in svg


def test_a_running_mean_lies_over_many_steps(tmp_path: Path, monkeypatch) -> None:
    run = make_run(tmp_path / "run", steps=200, every=1000)
    panels = drawn([run], tmp_path / "out.png", monkeypatch)
    raw, mean, validation = panels[PANELS["loss"]]
    loss = table(run)["loss"]
    np.testing.assert_array_equal(raw.get_ydata(), loss)
    np.testing.assert_allclose(mean.get_xdata(), np.arange(6, 196))
    wanted = [np.mean(loss[i - 5 : i + 6]) for i in range(5, 195)]
    np.testing.assert_allclose(mean.get_ydata(), wanted, rtol=1e-12)
    assert len(validation.get_xdata()) == 0


def test_both_kinds_are_written_and_equal_metrics_give_equal_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "alpaca")
    first = [file.read_bytes() for file in plot_metrics([run], tmp_path / "a/metrics.png")]
    again = [file.read_bytes() for file in plot_metrics([run], tmp_path / "b/metrics")]
    assert first == again
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "metrics.png",
        "metrics.svg",
    ]
    assert first[0].startswith(b"\x89PNG\r\n\x1a\n")
    assert ElementTree.fromstring(first[1]).tag == "{http://www.w3.org/2000/svg}svg"


def test_the_script_plots_several_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    runs = [str(make_run(tmp_path / name)) for name in ("one", "two")]
    words = ["scripts/plot_metrics.py", *runs, "--out", f"{tmp_path}/both.svg"]
    monkeypatch.setattr(sys, "argv", words)
    cli.run(load_script("scripts/plot_metrics.py").main, positional="runs")
    assert capsys.readouterr().out == f"picture in {tmp_path}/both.png {tmp_path}/both.svg\n"
    assert (tmp_path / "both.png").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"metrics.csv: cannot be read \(No such file or directory\).*--out_dir"),
        (b"\xff\xfe", r"metrics.csv: not UTF-8"),
        *(
            (text.encode(), r"metrics.csv: not the metrics of a run with at least one step")
            for text in (
                "",
                "step,loss\n1,2\n",
                f"{HEADER}\n",
                f"{HEADER}\n{ROW.replace('2.5', 'two')}\n",
            )
        ),
    ],
)
def test_files_that_cannot_be_plotted_are_one_line(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        plot_metrics([tmp_path], tmp_path / "out.png")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))
