"""Pictures of metrics: what is drawn is what metrics.csv holds."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from conftest import load_script

from lit_llama import UserError, cli
from lit_llama.plots import PANELS, draw, labels, plot_metrics, read_metrics, running_mean
from lit_llama.run_folder import METRICS, add_metrics, start_metrics


def make_run(folder: Path, steps: int = 9, seed: int = 0, every: int = 4) -> Path:
    """A run's folder with random metrics, validated after every so many steps."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    start_metrics(folder / "metrics.csv", 0)
    for step in range(1, steps + 1):
        loss, val_loss, learning_rate, norm, speed = map(float, rng.uniform(0.5, 2, 5))
        values = (loss, val_loss if step % every == 0 else None, learning_rate * 1e-4, norm, speed * 1000)
        add_metrics(folder / "metrics.csv", step, 8, 100, *values, 10**9)
    return folder


def lines(axes: object, dashed: bool = False) -> list[np.ndarray]:
    return [line.get_xydata() for line in axes.get_lines() if (line.get_linestyle() == "--") == dashed]


def table(run: Path) -> dict[str, np.ndarray]:
    """metrics.csv by numpy, nan where a field is empty."""
    return {name: np.genfromtxt(run / "metrics.csv", delimiter=",", names=True)[name] for name in METRICS.split(",")}


def test_what_is_drawn_is_what_the_files_hold(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", steps=17, seed=1)]
    figure = draw({run.name: read_metrics(run / "metrics.csv") for run in runs})
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert len(panels) == len(PANELS)
    for name, title in PANELS.items():
        for drawn, run in zip(lines(panels[title]), runs, strict=True):
            columns = table(run)
            np.testing.assert_array_equal(drawn, np.stack([columns["step"], columns[name]], axis=1))
    for drawn, run in zip(lines(panels[PANELS["loss"]], dashed=True), runs, strict=True):
        columns = table(run)
        points = np.stack([columns["step"], columns["val_loss"]], axis=1)
        np.testing.assert_array_equal(drawn, points[~np.isnan(columns["val_loss"])])
    legend = [text.get_text() for text in panels[PANELS["loss"]].get_legend().get_texts()]
    assert legend == ["one", "two", "training", "validation"]


def test_many_steps_have_a_running_mean_over_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=200, every=1000)
    figure = draw({"run": read_metrics(run / "metrics.csv")})
    loss = next(axes for axes in figure.axes if axes.get_ylabel() == PANELS["loss"])
    raw, smooth, *_ = lines(loss)
    np.testing.assert_array_equal(raw[:, 1], table(run)["loss"])
    middle = [np.mean(raw[i - 5 : i + 6, 1]) for i in range(5, 195)]
    np.testing.assert_allclose(smooth[5:195, 1], middle, rtol=1e-12)
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training"]
    np.testing.assert_allclose(running_mean([1, 2, 6], 3), [1.5, 3, 4])


def test_both_kinds_are_written_and_the_same_metrics_make_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "alpaca")
    first = [file.read_bytes() for file in plot_metrics([run], tmp_path / "a/metrics.png")]
    again = [file.read_bytes() for file in plot_metrics([run], tmp_path / "b/metrics")]
    assert first == again
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["metrics.png", "metrics.svg"]
    assert first[0].startswith(b"\x89PNG\r\n\x1a\n")
    assert ElementTree.fromstring(first[1]).tag == "{http://www.w3.org/2000/svg}svg"


def test_labels_are_as_short_as_they_can_be() -> None:
    assert labels([Path("out/lora/alpaca")]) == ["alpaca"]
    assert labels([Path("out/lora/alpaca"), Path("out/lora/dolly")]) == ["alpaca", "dolly"]
    assert labels([Path("out/lora/alpaca"), Path("out/full/alpaca")]) == ["lora/alpaca", "full/alpaca"]


def test_the_script_draws_several_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    runs = [str(make_run(tmp_path / name)) for name in ("one", "two")]
    monkeypatch.setattr(sys, "argv", ["scripts/plot_metrics.py", *runs, "--out", f"{tmp_path}/both.svg"])
    cli.run(load_script("scripts/plot_metrics.py").main, positional="runs")
    assert capsys.readouterr().out == f"picture in {tmp_path}/both.png {tmp_path}/both.svg\n"
    assert (tmp_path / "both.png").is_file()


ROW = "1,8,100,2.5,,0.1,1,10,100"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"metrics.csv: cannot be read \(No such file or directory\).*--out_dir"),
        (b"\xff\xfe", r"metrics.csv: not UTF-8"),
        (b"", r"metrics.csv: no metrics of a run, there is no column grad_norm"),
        (b"step,loss\n1,2\n", r"there is no column grad_norm, learning_rate, tokens_per_second, val_loss"),
        (f"{METRICS}\n".encode(), r"metrics.csv: no step in it yet"),
        (f"{METRICS}\n{ROW}\n2,8,100\n{ROW}\n".encode(), r"metrics.csv, line 3: damaged"),
        (f"{METRICS}\n{ROW}\n{ROW},7\n".encode(), r"metrics.csv, line 3: damaged"),
        (f"{METRICS}\n{ROW.replace('2.5', '')}\n".encode(), r"metrics.csv, line 2: damaged"),
    ],
)
def test_files_that_cannot_be_drawn_are_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        plot_metrics([tmp_path], tmp_path / "out.png")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_a_row_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(f"{METRICS}\n{ROW}\n2,8,10")
    assert read_metrics(tmp_path / "metrics.csv")["step"] == [1]
