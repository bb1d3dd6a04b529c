"""Disks, bytes, clocks and other runs that fail a run: one line, and nothing good is lost."""

import fcntl
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, load_script
from test_resume import finetune, rows_of

from lit_llama import UserError
from lit_llama.runtime import loggers
from lit_llama.storage.files import CHECKSUMS, verify_checksums, write_checksums
from lit_llama.storage.run_folder import checkpoints

CAMPAIGN = dict(flips=14, full_disks=2, small_disks=1, races=3, second_runs=2)
CAMPAIGN |= dict(corrupted_datasets=20, sharers=3)


def test_a_small_campaign_of_faults_is_survived() -> None:
    """What each does stands in tests/faults.py, which runs as many as wanted."""
    flags = [word for name, number in CAMPAIGN.items() for word in (f"--{name}", str(number))]
    command = [sys.executable, str(ROOT / "tests/faults.py"), "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    results = json.loads(done.stdout.rpartition("results")[2])
    if results["small_disks"][0] == 0:  # no file system may be mounted here
        results["small_disks"][0] = CAMPAIGN["small_disks"]
    assert results == {name: [number, 0] for name, number in CAMPAIGN.items()}


def test_checksums_are_those_of_zip(tmp_path: Path) -> None:
    (tmp_path / "folder/adapter").mkdir(parents=True)
    (tmp_path / "folder/empty").touch()
    (tmp_path / "folder/adapter/long").write_bytes(os.urandom((2 << 20) + 17))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("adapter/long", "empty"):
            archive.write(tmp_path / "folder" / name, name)
    write_checksums(tmp_path / "folder")
    lines = (tmp_path / "folder" / CHECKSUMS).read_text().splitlines()
    assert lines == [f"{entry.CRC:08x}  {entry.filename}" for entry in archive.infolist()]
    assert verify_checksums(tmp_path / "folder") is None
    (tmp_path / "folder/notes").write_text("a file of the user's own")
    assert verify_checksums(tmp_path / "folder") is None


def test_checksums_of_version_1_4_are_read(tmp_path: Path) -> None:
    """Their last line was for the lines above it."""
    (tmp_path / "file").write_text("content")
    write_checksums(tmp_path)
    with (tmp_path / CHECKSUMS).open("a") as file:
        file.write(f"8abf4ad7  {CHECKSUMS}\n")
    assert verify_checksums(tmp_path) is None
    (tmp_path / "file").write_text("contend")
    assert verify_checksums(tmp_path) == "file: missing or corrupted"


def damage(folder: Path) -> None:
    file = folder / "state.json"
    file.write_text(file.read_text().replace("1", "2", 1))


def test_where_no_checkpoint_is_whole_nothing_is_touched(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, capsys
) -> None:
    out = tmp_path / "out"
    finetune(out, tiny_checkpoint, tiny_data)
    newest, before = (out / f"step-{n:06}" for n in (3, 2))
    damage(newest)
    damage(before)
    left = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=r"no valid checkpoint is left \(step-000003/state.json: .*step-000002/"
    ):
        finetune(out, tiny_checkpoint, tiny_data, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == left
    # nor does a run begin anew where they have been set aside
    newest.rename(out / "step-000003.damaged")
    before.rename(out / "step-000002.damaged")
    with pytest.raises(
        UserError, match=r"no valid checkpoint is left \(step-000002.damaged; step-000003.da"
    ):
        finetune(out, tiny_checkpoint, tiny_data, resume=True)


def test_a_checkpoint_can_be_damaged_twice_and_one_without_checksums_is_read(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, capsys
) -> None:
    out = tmp_path / "out"
    finetune(out, tiny_checkpoint, tiny_data)
    (out / "step-000002" / CHECKSUMS).unlink()  # as earlier versions left it
    for aside in ("step-000003.damaged", "step-000003.damaged-2"):
        damage(out / "step-000003")
        capsys.readouterr()
        finetune(out, tiny_checkpoint, tiny_data, resume=True, train=dict(keep_last=2))
        line = f"{out}/step-000003/state.json: missing or corrupted; set aside as {aside}"
        assert f"{line}, resuming from step-000002" in capsys.readouterr().err.splitlines()
    assert [row[0] for row in rows_of(out)] == ["step", "1", "2", "3"]
    assert [folder.name for folder in checkpoints(out)] == ["step-000002", "step-000003"]


def test_a_file_system_without_locks_is_used_without(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, monkeypatch
) -> None:
    def unsupported(*args) -> None:
        raise OSError(95, "Operation not supported")

    out = tmp_path / "out"
    finetune(out, tiny_checkpoint, tiny_data, train=dict(max_steps=1))
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run is using this folder"):
        finetune(out, tiny_checkpoint, tiny_data, resume=True)
    monkeypatch.setattr("fcntl.flock", unsupported)
    finetune(out, tiny_checkpoint, tiny_data, resume=True)
    os.close(descriptor)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, monkeypatch
) -> None:
    """By hours, forward and back, at each look at it; a progress bar looks at it too."""
    recipe = dict(eval_interval=1)
    finetune(tmp_path / "steady", tiny_checkpoint, tiny_data, train=recipe)
    true_time, looks = time.time, []

    def jumping() -> float:
        looks.append(None)
        return true_time() + 7200 * (len(looks) % 3 - 1)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr("tqdm.std.time", jumping)
    monkeypatch.setattr(sys, "stderr", Terminal())
    finetune(tmp_path / "jumping", tiny_checkpoint, tiny_data, train=recipe)
    assert "3/3" in sys.stderr.getvalue()
    assert len(looks) > 5
    one, two = tmp_path / "steady", tmp_path / "jumping"
    name = "adapter_model.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes()
    assert rows_of(one) == rows_of(two)
    for row in (two / "metrics.csv").read_text().splitlines()[1:]:
        assert all(float(value) >= 0 for value in row.split(",")), row


def test_a_logger_that_hangs_at_the_end_holds_nothing_back(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, monkeypatch
) -> None:
    """Result, checkpoint and metrics are complete before the logger is closed."""
    out, left = tmp_path / "out", {}

    class Logger:
        def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...

        def save(self) -> None: ...

        def finalize(self, status: str) -> None:
            left.update({path: path.read_bytes() for path in out.rglob("*") if path.is_file()})
            raise KeyboardInterrupt

    monkeypatch.setattr(loggers, "open_logger", lambda *args: Logger())
    with pytest.raises(KeyboardInterrupt):
        finetune(out, tiny_checkpoint, tiny_data, logger="tensorboard")
    assert left == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert verify_checksums(out / "step-000003") is None
    assert rows_of(out)[-1][0] == "3"
    generate = load_script("generate/lora.py")
    generate.main(generate.AnswerArgs(prompt="Hello", max_new_tokens=3), lora_path=[out])
