"""The command line as a user meets it: in processes of their own."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script
from safetensors.torch import load_file

from lit_llama import UserError, cli
from lit_llama.adapter import AdapterConfig
from lit_llama.flags import WrongCall, read
from lit_llama.lora import LoRAConfig


@pytest.fixture
def call(python: str) -> Callable[..., subprocess.CompletedProcess]:
    def call(*command: object, folder: Path = ROOT) -> subprocess.CompletedProcess:
        return subprocess.run([python, *map(str, command)], cwd=folder, capture_output=True, text=True)

    return call


SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("benchmarks", "evaluate", "finetune", "generate", "scripts")
    for path in (ROOT / folder).glob("*.py")
    if "def main(" in path.read_text("utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_line_of_help_in_any_folder(script: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as status:
        cli.run(load_script(script).main)
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python {script} ")
    flags = text.split("\n  --")[1:]
    assert [flag.split()[0] for flag in flags[-3:]] == ["config", "print_config", "help"]
    for flag in flags:
        name, _, about = flag.split("\n\n")[0].partition("  ")
        assert len(about.split()) > 1, f"--{name} has no help"
        assert about.count("default") < 2, f"--{name} has its default twice"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["scripts/prepare_alpaca.py", "finetune/lora.py"])
def test_a_script_starts_in_any_folder(script: str, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / script, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: python {ROOT / script} [flags]" in done.stdout


def draw(
    runs: list[Path],
    out: Path = Path("a.png"),
    log: bool = False,
    grid: bool = True,
    colors: tuple[str, ...] = ("red", "blue"),
    sizes: list[int] | None = None,
    note: str = "",
    lora: LoRAConfig = LoRAConfig(),
    adapter: AdapterConfig | None = None,
) -> None:
    """Draw.

    Example:
        python draw.py a b
        python draw.py a --log

    Args:
        runs: folders.
        out: the file.
        log: a logarithmic axis.
        grid: lines.
        colors: of the curves.
        sizes: of the points; default: small ones.
        note: below it.
        lora: the method.
        adapter: something beside it.
    """


def test_help(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["draw.py"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        read(draw, ["-h"], positional="runs")
    lines = capsys.readouterr().out.splitlines()
    expected = """usage: python draw.py runs ... [flags]

Draw.

flags:
  runs ...                              folders (needed)
  --out PATH                            the file (default: a.png)
  --log                                 a logarithmic axis
  --grid true|false                     lines (default: true)
  --colors [TEXT, ...]                  of the curves (default: red, blue)
  --sizes [INT, ...]                    of the points; default: small ones
  --note TEXT                           below it

lora: the method:
  --lora.r INT                          rank of the update (default: 8)"""
    assert lines[:15] == expected.splitlines()
    assert "  --adapter.prompt_length INT           learned prompt vectors in each layer (default: 10)" in lines
    assert lines[-3:] == ["examples:", "    python draw.py a b", "    python draw.py a --log"]


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ("a", {"runs": [Path("a")], "log": False, "colors": ("red", "blue"), "sizes": None, "adapter": None}),
        ("a b --out c.png", {"runs": [Path("a"), Path("b")], "out": Path("c.png")}),
        ("--log a --grid false b", {"runs": [Path("a"), Path("b")], "log": True, "grid": False}),
        ("--runs a --runs b", {"runs": [Path("a"), Path("b")]}),
        ("--runs [a,b] c", {"runs": [Path("a"), Path("b"), Path("c")]}),
        (["R&D*", "a!"], {"runs": [Path("R&D*"), Path("a!")]}),
        (["out/a, b", "c[1]", "[d", "ä"], {"runs": [Path("out/a, b"), Path("c[1]"), Path("[d"), Path("ä")]}),
        (["['a, b', c]", "2024"], {"runs": [Path("a, b"), Path("c"), Path("2024")]}),
        ("a --colors green", {"colors": ("green",)}),
        ("a --colors 1 --colors [2,null]", {"colors": ("1", "2", "null")}),
        ("a --colors []", {"colors": ()}),
        ("a --sizes 1 --sizes 2", {"sizes": [1, 2]}),
        (["a", "--sizes", "[1, 2]"], {"sizes": [1, 2]}),
        (["a", "--note", "-3 and --more"], {"note": "-3 and --more"}),
        (["a", "--note=--log"], {"note": "--log", "log": False}),
        (["a", "--note", "[x"], {"note": "[x"}),
        ("a --note b --note c", {"note": "c"}),
        ("a --adapter.start_layer 1", {"adapter": AdapterConfig(start_layer=1)}),
        ("a --lora.targets all-linear --lora.r 2", {"lora": LoRAConfig(r=2, targets=("all-linear",))}),
    ],
    ids=str,
)
def test_words_become_arguments(words: str | list[str], seen: dict) -> None:
    arguments, _ = read(draw, words.split() if isinstance(words, str) else words, positional="runs")
    assert {name: arguments[name] for name in seen} == seen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora.rank 4", "--lora.rank: no such flag. Did you mean --lora.r?"),
        ("--lora.rank=4", "--lora.rank: no such flag. Did you mean --lora.r?"),
        ("--dropout 0", "--dropout: no such flag. Did you mean --lora.dropout?"),
        ("--lora-alpha 1", "--lora-alpha: no such flag. Did you mean --lora.alpha?"),
        ("--adapter.prompt_len 1", "--adapter.prompt_len: no such flag. Did you mean --adapter.prompt_length?"),
        ("--adapter 1", "--adapter: no such flag. Did you mean --adapter.prompt_length?"),
        ("--print_conf", "--print_conf: no such flag. Did you mean --print_config?"),
        ("--ou b", "--ou: no such flag. Did you mean --out?"),
        ("--zzz 1", "--zzz: no such flag"),
        ("-o b", "-o: no such flag"),
        ("a --lora.r many", "--lora.r many: should be a whole number"),
        ("a --lora.alpha many", "--lora.alpha many: should be a number"),
        ("a --adapter.start_layer 1.5", "--adapter.start_layer 1.5: should be a whole number"),
        ("a --grid=maybe", "--grid maybe: should be true or false"),
        ("a --sizes 1 --sizes x", '--sizes ["1", "x"]: should be a list, each part of it a whole number'),
        ("a --out", "--out: needs a value"),
        ("a --out --log", "--out: needs a value"),
        ("--log", "runs (one or more): needed"),
        ("a --config none.yaml", "--config none.yaml: cannot be read (No such file or directory)"),
    ],
)
def test_a_wrong_word_is_named(words: str, message: str) -> None:
    with pytest.raises(WrongCall) as error:
        read(draw, words.split(), positional="runs")
    assert str(error.value) == f"{message} (--help lists all)"


def test_words_that_belong_to_no_flag() -> None:
    with pytest.raises(WrongCall, match=r"^'movie' belongs to no flag\. Text with spaces needs quotes"):
        read(draw, ["--runs", "a", "--note", "Recommend", "movie"])
    with pytest.raises(WrongCall, match=r"--runs: needed"):
        read(draw, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rank: 4}", "{}: lora.rank: no such flag. Did you mean lora.r?"),
        ("lora.rank: 4", "{}: lora.rank: no such flag. Did you mean lora.r?"),
        ("lorra: {r: 4}", "{}: lorra.r: no such flag. Did you mean lora.r?"),
        ("adapter: {layer: 4}", "{}: adapter.layer: no such flag"),
        ("lora: 4", "{}: lora: no such flag. Did you mean lora.r?"),
        ("3: 4", "{}: 3: no such flag"),
        ("lora: {r: many}", "{}: lora.r many: should be a whole number"),
        ("adapter: {start_layer: many}", "{}: adapter.start_layer many: should be a whole number"),
        ("sizes: 3.5", '{}: sizes ["3.5"]: should be a list, each part of it a whole number'),
        ("- a", "--config {}: should hold flags, as --print_config prints them"),
        ("", "--config {}: should hold flags, as --print_config prints them"),
        ("lora: [", "--config {}: not YAML (while parsing a flow node"),
    ],
)
def test_a_wrong_key_in_a_file_is_named_with_the_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text, "utf-8")
    with pytest.raises(WrongCall) as error:
        read(draw, ["a", "--config", str(file)], positional="runs")
    assert str(error.value).startswith(message.format(file))
    assert len(str(error.value).splitlines()) == 1


def test_flags_take_precedence_over_a_file_in_any_order(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "runs: [a, b]\nlora: {r: 2, alpha: 4}\nadapter: null\nsizes: null\ncolors: red\nlog: yes\n", "utf-8"
    )
    for words in (["--lora.r", "3", "--config", str(file)], ["--config", str(file), "--lora.r", "3"]):
        arguments, text = read(draw, words, positional="runs")
        assert arguments["lora"] == LoRAConfig(r=3, alpha=4)
        assert (arguments["runs"], arguments["colors"], arguments["log"]) == ([Path("a"), Path("b")], ("red",), True)
        assert (arguments["sizes"], arguments["adapter"]) == (None, None)
        file.with_name("b.yaml").write_text(text, "utf-8")
        assert read(draw, ["--config", str(file.with_name("b.yaml"))]) == (arguments, text)
    assert read(draw, ["c", "--config", str(file)], positional="runs")[0]["runs"] == [Path("c")]


@pytest.mark.parametrize("script", [name for name in SCRIPTS if not name.startswith("benchmarks")])
def test_print_config_feeds_back(script: str, tmp_path: Path, capsys) -> None:
    main = load_script(script).main
    try:
        needed = []
        read(main, needed)
    except WrongCall as error:  # --source, --out_dir: needed
        needed = [f"{flag}=[a]" for flag in str(error).partition(":")[0].split(", ")]
    for how in ("--print_config", "--print_config=skip_default"):
        with pytest.raises(SystemExit):
            read(main, [*needed, how])
        file = tmp_path / "config.yaml"
        file.write_text(capsys.readouterr().out, "utf-8")
        assert read(main, ["--config", str(file)])[0] == read(main, needed)[0]
        with pytest.raises(SystemExit):
            read(main, [how])  # what is needed is null there, for the user to fill in
        file.write_text(capsys.readouterr().out, "utf-8")
        assert read(main, ["--config", str(file), *needed])[0] == read(main, needed)[0]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion(tmp_path: Path) -> None:
    script = tmp_path / "a.py"
    script.write_text(
        "# from lit_llama.cli import run\nprint('  --lora.r INT  rank\\n  --lora.alpha INT  a\\n  --out')"
    )
    for words, expected in (("a.py --lo", "--lora.r --lora.alpha"), ("a.py --out o", ""), ("b.py --", "")):
        line = f"source {ROOT}/scripts/completion.bash; COMP_WORDS=({sys.executable} {words})\n"
        line += "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _lit_llama; echo ${COMPREPLY[@]}"
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert (done.stdout.strip(), done.stderr) == (expected, "")


def test_a_run_can_be_repeated_from_its_config(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, call) -> None:
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


def test_a_wrong_call_is_one_line_and_status_2(call) -> None:
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
