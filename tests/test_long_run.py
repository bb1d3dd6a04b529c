"""Numbers that stay true: a long run holds no more and more, and nothing but its flags changes what a run writes."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

LONG_RUN_STEPS = int(os.environ.get("LONG_RUN_STEPS", 150))
"""LONG_RUN_STEPS=2000 make test ARGS='tests/test_long_run.py -s' prints what a long run holds over its course."""

# Runs finetune/lora.py; after every tenth step it notes what the process holds.
WATCHED = """
import gc, json, os, runpy, sys, threading
import lit_llama.training as training

held, original = [], training.train_step

def watched(run, model, trained, optimizer, args, step, sample_ids):
    result = original(run, model, trained, optimizer, args, step, sample_ids)
    if step % 10 == 9:
        gc.collect()
        if not held:
            gc.freeze()  # what is there now need not be gone through nor counted
        pages = int(open("/proc/self/statm").read().split()[1])
        handles, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        native = int(open("/proc/self/status").read().split("Threads:")[1].split()[0])
        held.append((step + 1, pages * os.sysconf("SC_PAGE_SIZE"), handles, threads, native, len(gc.get_objects())))
    return result

training.train_step = watched
report, script, *flags = sys.argv[1:]
sys.argv = [script, *flags]
runpy.run_path(script, run_name="__main__")
json.dump(held, open(report, "w"))
"""


def test_a_long_run_holds_no_more_at_its_end(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path) -> None:
    """Memory, file handles, threads and objects of a run with a validation and a checkpoint every 20 steps."""
    out, report, steps = tmp_path / "out", tmp_path / "held.json", LONG_RUN_STEPS
    train = dict(batch_size=4, micro_batch_tokens=512, epochs=steps, max_steps=steps, learning_rate=1e-2)
    train |= dict(eval_interval=20, save_interval=20)
    flags = [f"--train.{name}={value}" for name, value in train.items()]
    flags += [
        "--lora.dropout=0.1",
        f"--checkpoint_dir={tiny_checkpoint}",
        f"--data_dir={tiny_data}",
        f"--out_dir={out}",
    ]
    command = [sys.executable, "-c", WATCHED, report, ROOT / "finetune/lora.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    held = json.loads(report.read_text("utf-8"))
    assert [row[0] for row in held] == list(range(10, steps + 1, 10))
    second, last = held[len(held) // 4 : len(held) // 2], held[-(len(held) // 4) :]
    for row in held[:: max(1, len(held) // 10)] + held[-1:]:
        print(
            "step {}: {:.1f} MB, {} handles, {} threads of Python's, {} in all, {} objects".format(
                row[0], row[1] / 1e6, *row[2:]
            )
        )
    middle, end = (sorted(row[1] for row in rows)[len(rows) // 2] for rows in (second, last))
    print(
        f"median of the second quarter {middle / 1e6:.1f} MB, of the last {end / 1e6:.1f} MB: {end / middle - 1:+.2%}"
    )
    assert abs(end / middle - 1) < 0.02
    for column, name in enumerate(("handles", "threads", "native threads"), start=2):
        assert len({row[column] for row in second + last}) == 1, name
    assert max(row[5] for row in last) - min(row[5] for row in second) < 10  # a loss kept would be one a step

    with (out / "metrics.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert [row[0] for row in rows] == [str(step) for step in range(1, steps + 1)]
    assert Counter(map(len, rows)) == {len(header): steps}
    for row in rows:
        validated = int(row[0]) % 20 == 0 or int(row[0]) == steps
        assert all(float(cell) >= 0 for name, cell in zip(header, row, strict=True) if name != "val_loss" or validated)
        assert validated or row[header.index("val_loss")] == ""
    assert not list(out.glob(".*"))


# All of a folder's way: prepared, finetuned with two methods at once, and merged; relative or absolute paths.
PIPELINE = """
import runpy, sys

root, folder = sys.argv[1:]
sys.path.insert(0, f"{root}/scripts")
def script(name, **flags):
    sys.argv = [name, *(f"--{flag.replace('__', '.')}={value}" for flag, value in flags.items())]
    runpy.run_path(f"{root}/{name}", run_name="__main__")

recipe = dict(train__batch_size=8, train__max_steps=3, train__learning_rate=1e-2, train__save_interval=2, seed=7)
model, data = f"{folder}/model", f"{folder}/data"
for suffix in ("json", "csv"):
    prepared = dict(checkpoint_dir=model, val_size=8, max_seq_length=200)
    script("scripts/prepare_json.py", source=f"{folder}/records.{suffix}", data_dir=f"{data}-{suffix}", **prepared)
common = dict(checkpoint_dir=model, data_dir=f"{data}-json", lora__dropout=0.1, **recipe)
script("finetune/lora.py", out_dir=f"{folder}/lora", **common)
script("finetune/lora.py", out_dir=f"{folder}/both", adapter__start_layer=1, **common)
script("scripts/merge_lora.py", lora_path=f"{folder}/lora", out_dir=f"{folder}/merged")
"""


@pytest.fixture(scope="module")
def turkish(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A locale in which i is no lower case of I, and text is not UTF-8; the bare C where it cannot be made."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef"):
        make = ["localedef", "-i", "tr_TR", "-f", "ISO-8859-9", folder / "tr_TR.ISO-8859-9"]
        if subprocess.run(make, capture_output=True).returncode == 0:
            return {"LOCPATH": str(folder), "LC_ALL": "tr_TR.ISO-8859-9", "LANG": "tr_TR.ISO-8859-9"}
    return {"LC_ALL": "C", "LANG": "C"}


def test_nothing_but_its_flags_changes_what_a_run_writes(
    tmp_path: Path, tiny_checkpoint: Path, turkish: dict[str, str]
) -> None:
    """The same seed, with other hashes of strings, locale, encoding, time zone and working folder: the same bytes."""
    places = {
        "first": (".", {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC"}),
        "turkish": ("absolute", {"PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu", **turkish}),
        "bare": ("..", {"PYTHONHASHSEED": "random", "LC_ALL": "C", "LANG": "C", "TZ": "America/St_Johns"}),
    }
    words = ["fox", "İstanbul ısı", "漢字", "naïve", "🦊 jumps", "over\u2028the", "dog"]
    rng = random.Random(0)
    texts = [(f"Write {n}: {rng.choice(words)}", " ".join(rng.choices(words, k=n % 9 + 1))) for n in range(48)]
    written = {}
    for name, (start, settings) in places.items():
        folder = tmp_path / name / "run"
        shutil.copytree(tiny_checkpoint, folder / "model")
        records = [{"instruction": question, "input": "", "output": answer} for question, answer in texts]
        (folder / "records.json").write_text(json.dumps(records, ensure_ascii=False), "utf-8")
        with (folder / "records.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("instruction", "output"), *texts])
        working = {".": folder, "..": folder.parent, "absolute": Path("/")}[start]
        command = [sys.executable, "-c", PIPELINE, ROOT, {".": ".", "..": "run", "absolute": folder}[start]]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONUTF8"))}
        clean |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)} | settings
        done = subprocess.run(command, cwd=working, env=clean, capture_output=True)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
        written[name] = contents(folder, str(command[-1]))
        assert len(written[name]) > 40
    for name in ("turkish", "bare"):
        assert written[name].keys() == written["first"].keys()
        assert not [file for file in written["first"] if written[name][file] != written["first"][file]]


def contents(folder: Path, start: str) -> dict[str, bytes]:
    """Every file below `folder`, without the paths that were given and what tells of speed, as pictures do."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir() or (file.stem == "metrics" and file.suffix != ".csv"):
            continue
        content = file.read_bytes()
        if file.name in ("config.yaml", "adapter_config.json", "meta.json"):
            for path in ("model", "data-json", "data-csv", "lora", "both", "merged", "records.json", "records.csv"):
                for written in {f"{start}/{path}", os.path.normpath(f"{start}/{path}")}:
                    content = content.replace(f'"{written}"'.encode(), path.encode())
                    content = content.replace(f" {written}\n".encode(), f" {path}\n".encode())
        if file.name == "state.json":  # data_sha256 is of meta.json, with its paths
            content = json.dumps(json.loads(content) | {"data_sha256": ""}).encode()
        if file.name == "checksums.txt":  # those of the above differ too
            rest = (line for line in content.splitlines() if not line.endswith((b".json", b"checksums.txt")))
            content = b"\n".join(rest)
        if file.name == "metrics.csv":
            content = b"\n".join(b",".join(line.split(b",")[:7]) for line in content.splitlines())
        found[name] = content
    return found
