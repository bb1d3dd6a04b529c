"""Plot the metrics of finetuning runs as PNG and SVG. Guide: howto/logs.md"""

from pathlib import Path

from lit_llama.runtime.cli import run


def main(runs: list[Path], out: Path = Path("metrics.png")) -> None:
    """Plot loss, learning rate, gradient norm and speed of finetuning runs as PNG and SVG.

    Guide: howto/logs.md

    Example:
        python scripts/plot_metrics.py out/lora/alpaca out/full/alpaca --out compared.png

    Args:
        runs: Run directories with a metrics.csv.
        out: Output file; .png and .svg take the place of its suffix. Existing files are replaced.
    """
    # imported after the flags are read, so that --help is fast
    from lit_llama.runtime.plots import plot_metrics

    print("picture in", *plot_metrics(runs, out))


if __name__ == "__main__":
    run(main, positional="runs")
