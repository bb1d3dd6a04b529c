"""Draw the metrics of finetuning runs into one picture, PNG and SVG. Guide: howto/logs.md"""

from pathlib import Path

from lit_llama.cli import run
from lit_llama.plots import plot_metrics


def main(runs: list[Path], out: Path = Path("metrics.png")) -> None:
    """Draw losses, learning rate, gradient norm and speed of finetuning runs, over each other, as PNG and SVG.

    Guide: howto/logs.md

    Example:
        python scripts/plot_metrics.py out/lora/alpaca out/full/alpaca --out compared.png

    Args:
        runs: the runs' folders, which hold metrics.csv.
        out: where the picture goes; the other kind is put beside it, a picture that is there is replaced.
    """
    print("picture in", *plot_metrics(runs, out))


if __name__ == "__main__":
    run(main, positional="runs")
