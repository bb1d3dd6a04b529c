"""Faults against runs: python tests/faults.py --kills 60 --full_disks 20 --flips 200

Each fault strikes a forked process that has everything imported already. Afterwards the result is
compared with that of an undisturbed run: `bytes lost` are the bytes of result and metrics that
differ. A small campaign is part of the suite (test_faults.py); the kills are in test_resume.py.
"""

import argparse
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, make_hf_model, save_checkpoint_folder, save_tokenizer

from lit_llama import UserError, load_model
from lit_llama.runtime import cli
from lit_llama.storage.datasets import load_dataset
from lit_llama.storage.files import CHECKSUMS, verify_checksums
from lit_llama.storage.run_folder import checkpoints

torch.set_num_threads(1)  # others would not live on in a forked process

RECIPE = "--precision 32-true --seed 7 --train.batch_size 8 --train.learning_rate 1e-2"
RECIPE += " --train.save_interval 1 --train.eval_interval 1"
STEPS = 3  # so few that one step alone has the same learning rate
SCRIPTS = ("finetune/lora.py", "finetune/full.py")
ROW = re.compile(r"(?:[^,\n]*,){6}[^,\n]*")  # metrics.csv without what depends on the machine


class Place:
    """A tiny model, a tokenized dataset for it, and the folders of undisturbed runs."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.root, self.rng, self.number = root, rng, 0
        self.checkpoint, self.data = root / "checkpoint", root / "data"
        save_checkpoint_folder(self.checkpoint, num_key_value_heads=2)
        self.prepare = load_script("scripts/prepare_json.py").main
        self.mains = {script: load_script(script).main for script in SCRIPTS}
        outputs = [" ".join("one two"[: n % 8]) for n in range(60)]
        records = [dict(instruction=f"Count to {n}.", output=o) for n, o in enumerate(outputs)]
        (root / "records.json").write_text(json.dumps(records))
        self.forked(self.prepare_dataset)
        self.whole = {script: root / Path(script).stem for script in SCRIPTS}
        for script, out in self.whole.items():
            status, printed = self.train(script, out)
            assert status == 0, (status, printed)

    def prepare_dataset(self) -> None:
        sizes = dict(val_size=10, max_seq_length=400)
        self.prepare(self.root / "records.json", self.checkpoint, self.data, **sizes)

    def new_folder(self) -> Path:
        self.number += 1
        return self.root / f"out-{self.number}"

    def start(self, work: Callable, *args) -> tuple[int, Path]:
        """Start `work(*args)` in a process; return its id and the file with its output."""
        self.number += 1
        printed = self.root / f"printed-{self.number}"
        child = os.fork()
        if child:
            return child, printed
        status = 1
        try:
            file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(file, stream)
            os.close(file)  # there may be a limit on files
            files = [open(n, "w", buffering=1, closefd=False) for n in (1, 2)]  # noqa: SIM115
            sys.stdout, sys.stderr = files
            work(*args)
            status = 0
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status or 0)

    def finish(self, started: tuple[int, Path]) -> tuple[int, str]:
        child, printed = started
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, printed.read_text()

    def forked(self, work: Callable, *args) -> tuple[int, str]:
        return self.finish(self.start(work, *args))

    def run(self, script: str, out: Path, *more: str, steps: int = STEPS) -> None:
        """The script's command, in this process."""
        flags = ["--out_dir", out, "--checkpoint_dir", self.checkpoint, "--data_dir", self.data]
        flags += [*RECIPE.split(), "--train.max_steps", steps, *more]
        sys.argv = [script, *map(str, flags)]
        cli.run(self.mains[script])

    def train(self, script: str, out: Path, *more: str, **settings) -> tuple[int, str]:
        return self.forked(lambda: self.run(script, out, *more, **settings))

    def lost(self, script: str, out: Path) -> int:
        """Bytes of result and metrics that are not as the undisturbed run left them."""
        (weights,) = (path.name for path in self.whole[script].glob("*.safetensors"))
        pairs = [[(folder / weights).read_bytes() for folder in (out, self.whole[script])]]
        metrics = ((folder / "metrics.csv").read_text() for folder in (out, self.whole[script]))
        pairs.append(["\n".join(ROW.findall(text)).encode() for text in metrics])
        return sum(
            abs(len(one) - len(two)) + sum(a != b for a, b in zip(one, two, strict=False))
            for one, two in pairs
        )


def error_line(printed: str) -> str:
    """The one line that a run has ended with."""
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, printed
    assert "Traceback" not in printed, printed
    return lines[0]


def flips(place: Place, number: int) -> tuple[int, int]:
    """Flip a bit anywhere in a checkpoint, or truncate or remove its file: found and named.

    The last two times for each method a run resumes from the checkpoint before, to the same end.
    """
    lost = 0
    for n in range(number):
        script = SCRIPTS[n % len(SCRIPTS)]
        full_run = n >= number - 2 * len(SCRIPTS)
        out = place.new_folder() if full_run else place.whole[script]
        if full_run:
            shutil.copytree(place.whole[script], out)
        newest, before = reversed(checkpoints(out)[-2:])
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        files = [path for path in files if path.name != CHECKSUMS]
        file = place.rng.choice(files)
        content = file.read_bytes()
        where, kind = (
            place.rng.randrange(len(content)),
            place.rng.choice(["flip"] * 4 + ["cut", "gone"]),
        )
        if kind == "flip":
            changed = bytes([content[where] ^ 1 << place.rng.randrange(8)])
            file.write_bytes(content[:where] + changed + content[where + 1 :])
        elif kind == "cut":
            file.write_bytes(content[:where])
        else:
            file.unlink()
        name = str(file.relative_to(newest))
        found = verify_checksums(newest) or ""
        assert found.startswith(f"{name}: "), (n, kind, name, where, found)
        if not full_run:
            file.write_bytes(content)
            assert verify_checksums(newest) is None
            continue
        status, printed = place.train(script, out, "--resume")
        assert status == 0, (status, printed)
        said = [line for line in printed.splitlines() if "set aside" in line]
        assert len(said) == 1, printed
        aside = f"{newest.name}.damaged"
        assert said[0].startswith(f"{newest}/{name}: "), said
        assert said[0].endswith(f"; set aside as {aside}, resuming from {before.name}"), said
        assert (out / aside).is_dir()
        assert verify_checksums(newest) is None
        lost += place.lost(script, out)
    return number, lost


def full_disks(place: Place, number: int) -> tuple[int, int]:
    """Limit file sizes at random: one line, and the run resumes from the checkpoint before."""
    lost = 0
    for n in range(number):
        script = SCRIPTS[n % len(SCRIPTS)]
        out = place.new_folder()
        assert place.train(script, out, steps=1)[0] == 0
        largest = max(path.stat().st_size for path in (out / "step-000001").iterdir())
        limit = place.rng.randrange(largest)

        def starved(script: str = script, out: Path = out, limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            size = os.fstat(1).st_size
            sys.stdout.flush()
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            assert size < 4096
            place.run(script, out, "--resume")

        read, write = os.pipe()  # what it says must not be cut off by the limit

        def through_pipe(work: Callable = starved, pipe: int = write) -> None:
            for stream in (1, 2):
                os.dup2(pipe, stream)
            work()

        started = place.start(through_pipe)
        os.close(write)
        with open(read, encoding="utf-8") as pipe:
            printed = pipe.read()
        status, _ = place.finish(started)
        assert status == 1, (limit, status, printed)
        error_line(printed)
        assert [folder.name for folder in checkpoints(out)][:1] == ["step-000001"], printed
        assert all(verify_checksums(folder) is None for folder in checkpoints(out))
        assert not list(out.glob(".*")), list(out.glob(".*"))
        status, printed = place.train(script, out, "--resume")
        assert status == 0, (status, printed)
        lost += place.lost(script, out)
    return number, lost


def small_disks(place: Place, number: int) -> tuple[int, int]:
    """The same on a full file system, if one can be mounted, of one to three checkpoints."""
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount"]
    mounting = [*own_mounts, "mount", "-t", "tmpfs", "x", "/mnt"]
    if not shutil.which("unshare") or subprocess.run(mounting).returncode:
        return 0, 0
    lost = 0
    for n in range(number):
        script, mount = SCRIPTS[n % len(SCRIPTS)], place.new_folder()
        mount.mkdir()
        held = sum(path.stat().st_size for path in checkpoints(place.whole[script])[-1].rglob("*"))
        pages = place.rng.randrange(held // 4096, 3 * held // 4096)
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
            f"from pathlib import Path; import faults\n"
            f"faults.on_small_disk({str(place.root)!r}, {script!r}, Path({str(mount)!r}),"
            f" {pages * 4096}, {held})"
        )
        done = subprocess.run(
            [*own_mounts, sys.executable, "-c", code], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        lost += int(done.stdout.split()[-1])
    return number, lost


def on_small_disk(root: str, script: str, mount: Path, size: int, held: int) -> None:
    """Fill a disk of that size, enlarge it, resume, and print the bytes lost."""
    place = Place.__new__(Place)
    place.root, place.number = Path(root), 1000 * os.getpid()
    place.checkpoint, place.data = place.root / "checkpoint", place.root / "data"
    place.mains = {script: load_script(script).main}
    place.whole = {script: place.root / Path(script).stem}
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "x", mount], check=True)
    out = mount / "out"
    status, printed = place.train(script, out)
    assert status == 1, printed
    assert "No space left" in error_line(printed), printed
    assert all(verify_checksums(folder) is None for folder in checkpoints(out))
    assert not list(out.glob(".*"))
    subprocess.run(["mount", "-o", f"remount,size={100 * held}", mount], check=True)
    begun = (out / "config.yaml").is_file()
    status, printed = place.train(script, out, *(["--resume"] if begun else []))
    assert status == 0, (status, printed)
    print(place.lost(script, out))


def races(place: Place, number: int) -> tuple[int, int]:
    """Start two runs at once in one folder: one of them trains, the other prints one line."""
    lost = 0
    for n in range(number):
        out, resume = place.new_folder(), ["--resume"] * (n % 3 == 2)
        if n % 3 == 1:
            out.mkdir()
        if resume:
            assert place.train(SCRIPTS[0], out, steps=1)[0] == 0
        read, write = os.pipe()

        def wait_and_run(
            out: Path = out, more: list[str] = resume, pipes: tuple[int, int] = (read, write)
        ) -> None:
            os.close(pipes[1])
            select.select([pipes[0]], [], [])  # until it is closed
            place.run(SCRIPTS[0], out, *more)

        both = [place.start(wait_and_run) for _ in range(2)]
        os.close(write)
        os.close(read)
        ended = sorted(place.finish(started) for started in both)
        assert [status for status, _ in ended] == [0, 1], ended
        said = error_line(ended[1][1])
        # the first may have ended already
        late = "is done, at step 3 of 3" if resume else "holds another run"
        assert "another run is using this folder" in said or late in said, said
        assert not list(out.glob(".*"))
        lost += place.lost(SCRIPTS[0], out)
    return number, lost


def second_runs(place: Place, number: int) -> tuple[int, int]:
    """Start a second run while the first trains: it is refused, and changes nothing."""
    out = place.new_folder()
    first = place.start(lambda: place.run(SCRIPTS[0], out, "--train.epochs", "100000", steps=10**6))
    while not checkpoints(out):
        assert os.waitpid(first[0], os.WNOHANG) == (0, 0), first[1].read_text()
        time.sleep(0.02)
    os.kill(first[0], signal.SIGSTOP)  # nothing changes but by the second one
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for n in range(number):
        status, printed = place.train(SCRIPTS[0], out, *(["--resume"] if n % 2 else []))
        assert status == 1, printed
        problem = "another run is using this folder" if n % 2 else "holds another run"
        assert f"{out}: {problem}" in error_line(printed), printed
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    os.kill(first[0], signal.SIGKILL)  # which frees the folder
    os.kill(first[0], signal.SIGCONT)
    place.finish(first)
    reached = int(checkpoints(out)[-1].name.removeprefix("step-"))
    status, printed = place.train(
        SCRIPTS[0], out, "--resume", "--train.epochs", "100000", steps=reached + 1
    )
    assert status == 0, (status, printed)
    assert f"resuming after step {reached}" in printed
    return number, 0


def corrupted_datasets(place: Place, number: int) -> tuple[int, int]:
    """Flip a bit anywhere in a dataset: refused in one line."""
    data = place.new_folder()
    shutil.copytree(place.data, data)
    files = sorted(path for path in data.iterdir() if path.name != CHECKSUMS)
    for _ in range(number):
        file = place.rng.choice(files)
        content = file.read_bytes()
        where = place.rng.randrange(len(content))
        changed = bytes([content[where] ^ 1 << place.rng.randrange(8)])
        file.write_bytes(content[:where] + changed + content[where + 1 :])
        message = f"{file}: missing or corrupted. Prepare it again"
        with pytest.raises(UserError, match="^" + re.escape(message)):
            load_dataset(data, place.checkpoint)
        file.write_bytes(content)
    load_dataset(data, place.checkpoint)
    return number, 0


def sharers(place: Place, number: int) -> tuple[int, int]:
    """Load one model in several processes: together they hold its file in memory once."""
    folder = place.root / "larger"
    if not folder.exists():
        sizes = dict(vocab_size=8192, hidden_size=512, intermediate_size=1024)
        model = make_hf_model(**sizes, num_hidden_layers=3)
        model.bfloat16().save_pretrained(folder)
        save_tokenizer(folder)
    size = (folder / "model.safetensors").stat().st_size
    read, write = os.pipe()

    def load_and_wait() -> None:
        model = load_model(folder)
        sum(float(parameter.sum()) for parameter in model.parameters())  # all of it has been read
        os.write(write, b".")
        signal.pause()

    started = [place.start(load_and_wait) for _ in range(number)]
    try:
        for _ in started:
            ready = select.select([read], [], [], 60)[0]
            assert ready, [printed.read_text() for _, printed in started]
            os.read(read, 1)
        held = [pages_of(folder / "model.safetensors", child) for child, _ in started]
    finally:
        for child, _ in started:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(read)
        os.close(write)
    assert all(rss > 0.95 * size for rss, _ in held), held
    assert 0.95 * size < sum(pss for _, pss in held) < 1.05 * size, (held, size)
    return number, 0


def pages_of(file: Path, process: int) -> tuple[int, int]:
    """Return the bytes of a mapped file in a process's memory: Rss, and its share (Pss)."""
    rss = pss = 0
    inside = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside and (found := re.match(r"(Rss|Pss):\s+(\d+) kB", line)):
            rss += int(found[2]) * 1024 * (found[1] == "Rss")
            pss += int(found[2]) * 1024 * (found[1] == "Pss")
    return rss, pss


FAULTS = {
    "flips": flips,
    "full_disks": full_disks,
    "small_disks": small_disks,
    "races": races,
    "second_runs": second_runs,
    "corrupted_datasets": corrupted_datasets,
    "sharers": sharers,
}


def campaign(numbers: dict[str, int], seed: int) -> dict[str, tuple[int, int]]:
    """Return for each fault how many were survived, and the bytes lost."""
    with tempfile.TemporaryDirectory() as root:
        place = Place(Path(root), random.Random(seed))
        results = {}
        for name, number in numbers.items():
            if number:
                started = time.perf_counter()
                results[name] = FAULTS[name](place, number)
                print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, fault in FAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=0, help=fault.__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0, help="SIGKILL and SIGTERM during a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="for a program to read")
    args = vars(parser.parse_args())
    results = campaign({name: args[name] for name in FAULTS}, args["seed"])
    if args["kills"]:
        import test_resume

        with tempfile.TemporaryDirectory() as root:
            place = Place(Path(root), random.Random(args["seed"]))
            results |= test_resume.kill_campaign(
                Path(root), place.checkpoint, place.data, args["kills"]
            )
    if args["json"]:
        print("results", json.dumps(results))
        return
    print("| fault | tried | survived | bytes lost |\n|---|---|---|---|")
    for name, (number, lost) in results.items():
        print(f"| {name} | {number} | {number} | {lost} |")


if __name__ == "__main__":
    main()
