"""A long run holds no more and more memory, and the same flags write the same bytes anywhere."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# LONG_RUN_STEPS=2000 make test ARGS='tests/test_long_run.py -s' prints what a long run holds
LONG_RUN_STEPS = int(os.environ.get("LONG_RUN_STEPS", 120))

# Runs finetune/lora.py; after every tenth step it notes what the process holds.
WATCHED = """
import gc, json, os, runpy, sys, threading
import lit_llama.training as training

held, original = [], training.train_step

def watched(*args):
    result = original(*args)
    step = args[-1]
    if step % 10 == 9:
        gc.collect()
        if not held:
            gc.freeze()  # what is there now is neither visited nor counted
        size = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        held.append((step + 1, size, files, threads, len(gc.get_objects())))
    return result

training.train_step = watched
report, *sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
json.dump(held, open(report, "w"))
"""


def test_a_long_run_holds_no_more_at_its_end(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path
) -> None:
    """With a validation and a checkpoint every 20 steps."""
    out, report, steps = tmp_path / "out", tmp_path / "held.json", LONG_RUN_STEPS
    train = dict(batch_size=4, micro_batch_tokens=512, epochs=steps, max_steps=steps)
    train |= dict(learning_rate=1e-2, eval_interval=20, save_interval=20)
    flags = [f"--train.{name}={value}" for name, value in train.items()]
    flags += [f"--checkpoint_dir={tiny_checkpoint}", f"--data_dir={tiny_data}"]
    flags += [f"--out_dir={out}", "--lora.dropout=0.1"]
    command = [sys.executable, "-c", WATCHED, report, ROOT / "finetune/lora.py", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    held = json.loads(report.read_text("utf-8"))
    assert [row[0] for row in held] == list(range(10, steps + 1, 10))
    for step, size, files, threads, objects in held[:: max(1, len(held) // 10)]:
        numbers = f"{files} files, {threads} threads, {objects} objects"
        print(f"step {step}: {size / 1e6:.1f} MB, {numbers}")
    second, last = held[len(held) // 4 : len(held) // 2], held[-(len(held) // 4) :]
    middle, end = (sorted(row[1] for row in rows)[len(rows) // 2] for rows in (second, last))
    assert abs(end / middle - 1) < 0.02
    assert len({row[2:4] for row in map(tuple, second + last)}) == 1
    # a loss that is not freed would be one object a step
    assert max(row[4] for row in last) - min(row[4] for row in second) < 10

    with (out / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, steps + 1)]
    for row in rows:
        validated = int(row["step"]) % 20 == 0 or int(row["step"]) == steps
        assert (row["val_loss"] != "") == validated
    assert not list(out.glob(".*"))


# The whole way: prepared, finetuned with two methods at once, and merged.
PIPELINE = """
import runpy, sys

root, folder = sys.argv[1:]
sys.path.insert(0, f"{root}/scripts")

def script(name, **flags):
    flags = {key.replace("__", "."): value for key, value in flags.items()}
    sys.argv = [name, *(f"--{key}={value}" for key, value in flags.items())]
    runpy.run_path(f"{root}/{name}", run_name="__main__")

model, data, lora = (f"{folder}/{name}" for name in ("model", "data", "lora"))
for kind in ("csv", "json"):
    source = f"{folder}/records.{kind}"
    script("scripts/prepare_json.py", source=source, data_dir=f"{data}-{kind}", val_size=8,
           checkpoint_dir=model)
common = dict(checkpoint_dir=model, data_dir=f"{data}-json", lora__dropout=0.1, seed=7)
common |= dict(train__batch_size=8, train__max_steps=3, train__save_interval=2)
script("finetune/lora.py", out_dir=lora, **common)
script("finetune/lora.py", out_dir=f"{folder}/both", adapter__start_layer=1, **common)
script("scripts/merge_lora.py", lora_path=lora, out_dir=f"{folder}/merged")
"""


@pytest.fixture(scope="module")
def turkish(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A locale in which i is not the lower case of I, and text is not UTF-8; else the bare C."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef"):
        make = ["localedef", "-i", "tr_TR", "-f", "ISO-8859-9", folder / "tr_TR.ISO-8859-9"]
        if subprocess.run(make, capture_output=True).returncode == 0:
            return {"LOCPATH": str(folder), "LC_ALL": "tr_TR.ISO-8859-9"}
    return {"LC_ALL": "C"}


def test_the_same_flags_write_the_same_bytes(
    tmp_path: Path, tiny_checkpoint: Path, turkish: dict[str, str]
) -> None:
    """With other hashes of strings, another locale, encoding, time zone and working folder."""
    places = {
        "first": (".", {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC"}),
        "turkish": ("/", {"PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu", **turkish}),
    }
    words = ["fox", "İstanbul ısı", "漢字", "naïve", "🦊 jumps", "over\u2028the", "dog"]
    rng, texts = random.Random(0), []
    for n in range(48):
        texts.append((f"Write {n}: {rng.choice(words)}", " ".join(rng.choices(words, k=n % 9 + 1))))
    written = {}
    for name, (start, settings) in places.items():
        folder = tmp_path / name
        shutil.copytree(tiny_checkpoint, folder / "model")
        records = [{"instruction": question, "output": answer} for question, answer in texts]
        text = json.dumps(records, ensure_ascii=False)
        (folder / "records.json").write_text(text, "utf-8")
        with (folder / "records.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("instruction", "output"), *texts])
        given = "." if start == "." else str(folder)
        own = ("LC_", "LANG", "PYTHONUTF8")
        env = {key: value for key, value in os.environ.items() if not key.startswith(own)}
        env |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
        env |= {"OMP_NUM_THREADS": "1"} | settings
        command = [sys.executable, "-c", PIPELINE, ROOT, given]
        done = subprocess.run(command, cwd=folder / start, env=env, capture_output=True)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
        written[name] = contents(folder, given)
        assert len(written[name]) > 40
    first, turkish_files = written.values()
    assert first.keys() == turkish_files.keys()
    assert [file for file in first if first[file] != turkish_files[file]] == []


def contents(folder: Path, given: str) -> dict[str, bytes]:
    """All files, without the paths that were passed and without measured times."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        if file.name in ("config.yaml", "adapter_config.json", "meta.json"):
            for path in {given, os.path.normpath(given)}:
                content = content.replace(f"{path}/".encode(), b"")
        if file.name == "state.json":  # data_sha256 is that of meta.json, which has paths
            content = json.dumps(json.loads(content) | {"data_sha256": ""}).encode()
        if file.name == "checksums.txt":  # so are these
            content = b"\n".join(x for x in content.splitlines() if not x.endswith(b".json"))
        if file.name == "metrics.csv":  # without the last two columns
            content = b"\n".join(line.rsplit(b",", 2)[0] for line in content.splitlines())
        if file.stem != "metrics" or file.suffix == ".csv":
            found[str(file.relative_to(folder))] = content
    return found
