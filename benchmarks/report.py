"""benchmarks/RESULTS.md from the files in benchmarks/results:  python benchmarks/report.py"""

import json
from pathlib import Path

from common import RESULTS, ROOT

from lit_llama.cli import run

SECTIONS = {
    "finetune": "Finetuning beside peers",
    "generate": "Decoding beside peers",
    "flags": "What the flags cost and buy",
    "prepare": "Preparing data, and what its amount costs",
    "load": "Loading",
    "many_loras": "Many LoRAs on one base",
    "rank": "What the rank of a LoRA buys",
}
HEAD = """# Results

Written by `python benchmarks/report.py` from benchmarks/results, which the benchmarks fill: `make bench` on a CPU,
`make bench-gpu` on a GPU. Contenders run in processes of their own, in alternation; the tables hold medians. The
CPU was shared, so ratios within a table are what counts there; absolute figures come from a GPU and carry its name.
"""


def main(results: Path = RESULTS, out: Path = ROOT / "benchmarks/RESULTS.md") -> None:
    """Write RESULTS.md.

    Args:
        results: the folder of JSON files.
        out: the file to write.
    """
    parts = [HEAD]
    for name, title in SECTIONS.items():
        for kind, place in (("cpu", "CPU"), ("cuda", "GPU")):
            files = sorted(results.glob(f"{name}*-{kind}.json"))
            if not files and kind == "cuda" and name in ("finetune", "generate"):
                parts.append(f"## {title}, GPU\n\nnot measured\n")
            for file in files:
                parts.append(section(json.loads(file.read_text("utf-8")), place))
    out.write_text("\n".join(parts), "utf-8")


def section(result: dict, place: str) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    lines = [f"## {result['title']}, {place}", "", f"    {result['command']}", ""]
    lines += [f"{result['setting']} {result['device']}; {versions}; {result['date']}.", "", result["table"], ""]
    return "\n".join(lines + [f"- {note}" for note in result["notes"]] + [""] * bool(result["notes"]))


if __name__ == "__main__":
    run(main)
