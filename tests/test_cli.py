"""The command line as a user meets it: in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script
from safetensors.torch import load_file

from lit_llama import UserError, cli


def call(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)


SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("benchmarks", "finetune", "generate", "scripts")
    for path in (ROOT / folder).glob("*.py")
    if "def main(" in path.read_text("utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_line_of_help(script: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as status:
        cli.run(load_script(script).main)
    assert status.value.code == 0
    text = capsys.readouterr().out
    for flag in text.split("\n  --")[1:]:
        name, _, rest = flag.partition(" ")
        help_text = " ".join(rest.split("(type:")[0].split())
        assert name.startswith(("config", "print_config", "help")) or len(help_text.split()) > 2, (
            f"--{name} has no help"
        )


def test_a_run_can_be_repeated_from_its_config(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path) -> None:
    flags = ["--checkpoint_dir", tiny_checkpoint, "--data_dir", tiny_data, "--precision", "32-true", "--lora.r", 4]
    flags += ["--train.max_steps", 2, "--train.batch_size", 8, "--lora.targets", "[q_proj, o_proj]", "--seed", 3]
    first = call("finetune/lora.py", *flags, "--out_dir", tmp_path / "first")
    assert first.returncode == 0, first.stderr
    assert "done: val loss" in first.stdout
    again = call("finetune/lora.py", "--config", tmp_path / "first/config.yaml", "--out_dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    loras = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "again")]
    assert all(torch.equal(tensor, loras[1][name]) for name, tensor in loras[0].items())
    longer = ["--config", tmp_path / "again/config.yaml", "--train.max_steps", 3]
    assert call("finetune/lora.py", *longer, "--resume").returncode == 0
    once_more = call("finetune/lora.py", "--config", tmp_path / "again/config.yaml", "--out_dir", tmp_path / "third")
    assert once_more.returncode == 0, once_more.stderr


def test_a_wrong_call_is_one_line_and_status_2() -> None:
    for flags in (["--lora.rank", "4"], ["--train.batch_size", "many"], []):
        script = "finetune/lora.py" if flags else "generate/base.py"
        done = call(script, *flags)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
        assert not done.stdout


def test_a_switch_needs_no_value(monkeypatch) -> None:
    """`--resume` alone is `--resume true`; what follows it stays what it is."""
    seen = []

    def main(name: str = "", resume: bool = False, other: bool = True) -> None:
        """Note the flags."""
        seen.append((name, resume, other))

    for flags in (["--resume"], ["--resume", "--name", "a"], ["--resume", "true"], ["--other", "false"]):
        monkeypatch.setattr(sys, "argv", ["script", *flags])
        cli.run(main)
    assert seen == [("", True, True), ("a", True, True), ("", True, True), ("", False, False)]


def test_a_mistake_is_told_once_by_all_processes_of_a_machine(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as ended:  # the first process lives on: it has not seen this
        cli.run(failing(UserError("file: wrong")))
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: file: wrong\n"

    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended

    parents = iter([1, 1, 2])
    monkeypatch.setattr(cli.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(cli.os, "_exit", end)
    with pytest.raises(Ended):
        cli.run(failing(UserError("file: wrong")))
    assert capsys.readouterr().err == ""


def failing(error: BaseException):
    def main() -> None:
        """Fail."""
        raise error

    return main


GONE = "error: another process of this run has ended, and so does this one. Go on with --resume"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("file: wrong"), 1, "error: file: wrong"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "error: a.txt: No such file"),
        (OSError(28, "No space left on device"), 1, "error: writing: No space left on device"),
        (KeyboardInterrupt(), 130, "error: stopped"),
        (RuntimeError("gloo/pair.cc: Connection closed by peer [127.0.0.1]"), 1, GONE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_mistakes_are_one_line(monkeypatch, capsys, error: BaseException, status: int, line: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as ended:
        cli.run(failing(error))
    assert ended.value.code == status
    assert capsys.readouterr().err == line + "\n"


def test_a_bug_keeps_its_traceback(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(ZeroDivisionError):
        cli.run(failing(ZeroDivisionError()))
