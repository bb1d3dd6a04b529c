"""Write benchmarks/RESULTS.md from benchmarks/results:  python benchmarks/report.py"""

import json
from pathlib import Path

from common import RESULTS, ROOT

from lit_llama.runtime.cli import run

SECTIONS = {
    "finetune": "Finetuning beside peers",
    "generate": "Decoding beside peers",
    "busy": "Finetuning beside a busy process",
    "flags": "What the flags cost and buy",
    "prepare": "Preparing data, and what its amount costs",
    "load": "Loading",
    "many_loras": "Many LoRAs on one base",
    "rank": "What the rank of a LoRA buys",
    "count": "A training step on a GPU",
    "gpu": "Every path",
}
HEAD = (
    "# Results\n\n"
    "Written by `python benchmarks/report.py` from benchmarks/results, which `make bench` "
    "fills. Contenders run in\n"
    "processes of their own, in alternation; the tables hold medians. The CPU was shared, "
    "so ratios within a table are\n"
    "what counts. On a GPU, `make bench-gpu` measures every path in one process.\n"
)


def main(results: Path = RESULTS, out: Path = ROOT / "benchmarks/RESULTS.md") -> None:
    """Write RESULTS.md.

    Args:
        results: Folder of JSON files.
        out: Output file.
    """
    parts = [HEAD]
    for name, title in SECTIONS.items():
        for kind, place in (("cpu", "CPU"), ("cuda", "GPU"), ("counted", "counted")):
            files = sorted(results.glob(f"{name}*-{kind}.json"))
            if not files and kind == "cuda" and name in ("finetune", "generate", "gpu"):
                parts.append(f"## {title}, GPU\n\nnot measured\n")
            for file in files:
                parts.append(section(json.loads(file.read_text("utf-8")), place))
    out.write_text("\n".join(parts), "utf-8")


def section(result: dict, place: str) -> str:
    """Return the part of a result."""
    versions = [f"{package} {version}" for package, version in result["versions"].items()]
    about = f"{result['setting']} {result['device']}; {', '.join(versions)}; {result['date']}."
    lines = [f"## {result['title']}, {place}", "", f"    {result['command']}", ""]
    lines += [about, "", result["table"], ""]
    if result["notes"]:
        lines += [*(f"- {note}" for note in result["notes"]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
