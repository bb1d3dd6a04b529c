"""The command line as a user meets it: what words become, what --help prints, how errors end."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from conftest import ROOT, load_script
from safetensors.torch import load_file

from lit_llama.args import AdapterConfig, LoRAConfig
from lit_llama.errors import UsageError, UserError
from lit_llama.runtime import cli
from lit_llama.runtime.args import RunArgs, TrainArgs
from lit_llama.runtime.cli import parse


@pytest.fixture
def call(python: str) -> Callable[..., subprocess.CompletedProcess]:
    def call(*command: object) -> subprocess.CompletedProcess:
        command = [python, *map(str, command)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    return call


SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("benchmarks", "evaluate", "finetune", "generate", "scripts")
    for path in (ROOT / folder).glob("*.py")
    if "def main(" in path.read_text("utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_line_of_help_in_any_folder(
    script: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as status:
        cli.run(load_script(script).main)
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python {script} ")
    flags = text.split("\n  --")[1:]
    assert [flag.split()[0] for flag in flags[-3:]] == ["config", "print_config", "help"]
    flags = flags[:-3]
    for flag in flags:
        name, _, about = flag.split("\n\n")[0].partition("  ")
        assert len(about.split()) > 1, f"--{name} has no help"
        assert about.count("default") < 2, f"--{name} has its default twice"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script", ["scripts/prepare_alpaca.py", "finetune/lora.py", "generate/base.py"]
)
def test_help_works_in_any_folder_and_does_not_load_torch(script: str, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", ROOT / script, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"usage: python {ROOT / script} [flags]" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "jsonargparse" in loaded
    assert not loaded & {"torch", "lightning", "matplotlib", "tokenizers"}


def draw(
    runs: list[Path],
    out: Path = Path("a.png"),
    log: bool = False,
    grid: bool = True,
    colors: tuple[str, ...] = ("red", "blue"),
    sizes: list[int] | None = None,
    note: str | None = None,
    style: Literal["line", "dots"] = "line",
    lora: LoRAConfig = LoRAConfig(),
    adapter: AdapterConfig | None = None,
) -> None:
    """Draw.

    Example:
        python draw.py a b
        python draw.py a --log

    Args:
        runs: Folders.
        out: Output file.
        log: Use a logarithmic axis.
        grid: Draw lines.
        colors: Colors of the curves.
        sizes: Sizes of the points (default: small).
        note: Text below it.
        style: Style of the curves.
        lora: The method.
        adapter: Something beside it.
    """


def test_help(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["draw.py"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(draw, ["-h"], positional="runs")
    lines = capsys.readouterr().out.splitlines()
    expected = """usage: python draw.py runs ... [flags]

Draw.

options:
  --runs [PATH, ...]                Folders (required)
  --out PATH                        Output file (default: a.png)
  --log                             Use a logarithmic axis
  --grid true|false                 Draw lines (default: True)
  --colors [TEXT, ...]              Colors of the curves (default: red, blue)
  --sizes [INT, ...]                Sizes of the points (default: small)
  --note TEXT                       Text below it
  --style line|dots                 Style of the curves (default: line)

The method:
  --lora.r INT                      Rank of the update (default: 8)"""
    assert lines[:16] == expected.splitlines()
    assert "Something beside it:" in lines
    assert lines[-3:] == ["examples:", "    python draw.py a b", "    python draw.py a --log"]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("columns", [80, 100])
def test_help_fits_the_terminal(monkeypatch, capsys, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "argv", ["finetune/lora.py"])
    with pytest.raises(SystemExit):
        parse(finetune, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    if columns == 100:  # one line a flag, but for --precision with its three long values
        assert sum(line.startswith("   ") for line in lines) <= 1


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ("a", {"runs": [Path("a")], "log": False, "colors": ("red", "blue"), "sizes": None}),
        ("a", {"lora": LoRAConfig(), "adapter": None, "note": None}),
        ("a b --out c.png", {"runs": [Path("a"), Path("b")], "out": Path("c.png")}),
        ("--log a --grid false b", {"runs": [Path("a"), Path("b")], "log": True, "grid": False}),
        ("--runs a --runs b", {"runs": [Path("a"), Path("b")]}),
        ("--runs [a,b] c", {"runs": [Path("a"), Path("b"), Path("c")]}),
        (["R&D*", "a!"], {"runs": [Path("R&D*"), Path("a!")]}),
        (
            ["out/a, b", "c[1]", "[d", "ä"],
            {"runs": [Path(p) for p in ("out/a, b", "c[1]", "[d", "ä")]},
        ),
        (["['a', \"b\"]", "2024"], {"runs": [Path("a"), Path("b"), Path("2024")]}),
        ("a --colors green", {"colors": ("green",)}),
        ("a --colors 1 --colors [2,null]", {"colors": ("1", "2", "null")}),
        ("a --colors []", {"colors": ()}),
        ("a --sizes 1 --sizes 2", {"sizes": [1, 2]}),
        (["a", "--sizes", "[1, 2]"], {"sizes": [1, 2]}),
        ("a --sizes null", {"sizes": None}),
        (["a", "--note", "-3 and --more"], {"note": "-3 and --more"}),
        (["a", "--note=--log"], {"note": "--log", "log": False}),
        ("a --note b --note c", {"note": "c"}),
        ("a --adapter.start_layer 1", {"adapter": AdapterConfig(start_layer=1)}),
        ("a --lora.targets all-linear", {"lora": LoRAConfig(targets=("all-linear",))}),
        ("a --lora.targets x --lora.targets y", {"lora": LoRAConfig(targets=("x", "y"))}),
        (["a", "--lora.targets", "[x, y]"], {"lora": LoRAConfig(targets=("x", "y"))}),
    ],
    ids=str,
)
def test_words_become_arguments(words: str | list[str], seen: dict) -> None:
    arguments = parse(draw, words.split() if isinstance(words, str) else words, positional="runs")
    assert {name: arguments[name] for name in seen} == seen


TEXTS = [
    "# A title",
    "---",
    "a\0b",
    "[x",
    '{"a": 1}',
    "[1, 2]",
    "2001-01-01",
    "0b_",
    "1" * 5000,
    "!!int x",
    "*a",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is(text: str) -> None:
    assert parse(draw, ["a", f"--note={text}"], positional="runs")["note"] == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora.rank 4", "--lora.rank: no such flag. Did you mean --lora.r?"),
        ("--lora.rank=4", "--lora.rank: no such flag. Did you mean --lora.r?"),
        ("--dropout 0", "--dropout: no such flag. Did you mean --lora.dropout?"),
        ("--lora-alpha 1", "--lora-alpha: no such flag. Did you mean --lora.alpha?"),
        ("--adapter.layer 1", "--adapter.layer: no such flag. Did you mean --adapter.start_layer?"),
        ("--print_conf", "--print_conf: no such flag. Did you mean --print_config?"),
        ("--ou b", "--ou: no such flag. Did you mean --out?"),
        ("--zzz 1", "--zzz: no such flag"),
        ("-o b", "-o: no such flag"),
        ("a --lora.r many", "--lora.r many: should be INT"),
        ("a --lora.r 0", "--lora.r 0: should be INT >0"),
        ("a --lora.dropout 1", "--lora.dropout 1: should be FLOAT >=0 and <1"),
        ("a --lora.alpha .nan", "--lora.alpha .nan: should be FLOAT"),
        ("a --lora.alpha null", "--lora.alpha null: should be FLOAT"),
        ("a --adapter.start_layer 1.5", "--adapter.start_layer 1.5: should be INT"),
        ("a --adapter 1", "--adapter 1: should be AdapterConfig"),
        ("a --grid=maybe", "--grid maybe: should be true|false"),
        ("a --style bars", "--style bars: should be line|dots"),
        ("a --sizes 1 --sizes x", '--sizes ["1", "x"]: should be [INT, ...]'),
        ("a --out", "--out: needs a value"),
        ("a --out --log", "--out: needs a value"),
        ("--log", "the following arguments are required: runs"),
    ],
)
def test_a_wrong_word_is_named(words: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(draw, words.split(), positional="runs")
    assert str(error.value) == f"{message} (--help lists all flags)"


def test_words_that_belong_to_no_flag() -> None:
    with pytest.raises(UsageError, match=r"^'movie' belongs to no flag\. Text with spaces needs"):
        parse(draw, ["--runs", "a", "--note", "Recommend", "movie"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rank: 4}", "--lora.rank: no such flag. Did you mean --lora.r?"),
        ("lora.rank: 4", "--lora.rank: no such flag. Did you mean --lora.r?"),
        ("3: 4", "--3: no such flag"),
        ("lora: 4", "--lora: no such flag"),
        ("- a", "should contain flags, as --print_config prints them"),
        ("", "should contain flags, as --print_config prints them"),
        ("lora: [", "while parsing a flow node"),
        ("note: \xff", "'utf-8' codec can't decode byte 0xff in position 6"),
    ],
)
def test_a_wrong_config_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError) as error:
        parse(draw, ["a", "--config", str(file)], positional="runs")
    assert str(error.value).startswith(f"--config {file}: {message}")
    file.unlink()
    with pytest.raises(UsageError, match=f"^--config {file}: .*No such file"):
        parse(draw, ["a", "--config", str(file)], positional="runs")


def test_flags_take_precedence_over_config_in_any_order(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "runs: [a, 'b, c']\nlora: {r: 2, alpha: 4}\nlora.dropout: 0.5\nadapter: null\nsizes: null\n"
        "colors: red\nlog: yes\nnote: '# 1'\n"
    )
    for words in (["--lora.r", "3", "--config", str(file)], ["--config", str(file), "--lora.r=3"]):
        arguments = parse(draw, words, positional="runs")
        assert arguments["lora"] == LoRAConfig(r=3, alpha=4, dropout=0.5)
        assert arguments["runs"] == [Path("a"), Path("b, c")]
        assert (arguments["colors"], arguments["log"], arguments["note"]) == (("red",), True, "# 1")
        assert (arguments["sizes"], arguments["adapter"]) == (None, None)
    assert parse(draw, ["c", "--config", str(file)], positional="runs")["runs"] == [Path("c")]
    second = tmp_path / "b.yaml"
    second.write_text("lora: {r: 5}\nadapter: {start_layer: 1}")
    arguments = parse(draw, ["--config", str(file), "--config", str(second)])
    assert arguments["lora"] == LoRAConfig(r=5, alpha=4, dropout=0.5)
    assert arguments["adapter"] == AdapterConfig(start_layer=1)


def finetune(
    args: RunArgs = RunArgs(out_dir=Path("out/lora/alpaca"), seed=7),
    lora: LoRAConfig = LoRAConfig(),
    adapter: AdapterConfig | None = None,
    train: TrainArgs = TrainArgs(warmup_epochs=2),
) -> None:
    """Finetune.

    Args:
        lora: The method.
        adapter: A LLaMA-Adapter beside the LoRA, if one of these flags is given.
        train: The recipe.
    """


def test_the_fields_of_args_are_flags_without_a_prefix() -> None:
    words = ["--devices", "2", "--resume", "--precision", "32-true", "--lora.r", "4"]
    arguments = parse(finetune, words)
    run = RunArgs(Path("out/lora/alpaca"), devices=2, seed=7, resume=True, precision="32-true")
    assert arguments == {
        "args": run,
        "lora": LoRAConfig(r=4),
        "adapter": None,
        "train": TrainArgs(warmup_epochs=2),
    }
    for word, message in (("--devices=0", "INT >0"), ("--logger=x", r"tensorboard\|wandb\|mlflow")):
        with pytest.raises(UsageError, match=message):
            parse(finetune, [word])


def test_as_flags_is_a_config(tmp_path: Path) -> None:
    """What config.yaml of a run holds calls the script again, and is plain YAML."""
    for words in ([], ["--adapter.start_layer=1", "--lora.targets=[a]", "--train.max_steps=3"]):
        arguments = parse(finetune, [*words, "--train.warmup_epochs=null"])
        groups = {name: value for name, value in arguments.items() if name != "args"}
        text = yaml.safe_dump(arguments["args"].as_flags(**groups), sort_keys=False)
        file = tmp_path / "config.yaml"
        file.write_text(text)
        assert parse(finetune, ["--config", str(file)]) == arguments
        assert text.startswith("out_dir: out/lora/alpaca\ncheckpoint_dir: checkpoints/")


CONFIG_OF_1_4 = """\
out_dir: out/a
lora:
  r: 8
  alpha: 16.0
  targets:
  - q_proj
  - v_proj
  use_rslora: false
adapter: null
train:
  batch_size: 8
  max_steps: 2
  learning_rate: 0.0003
  schedule: cosine
  warmup_epochs: null
checkpoint_dir: /models/tiny
resume: false
quantize: null
"""


def test_config_of_1_4_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG_OF_1_4)
    arguments = parse(finetune, ["--config", str(file)])
    run = RunArgs(Path("out/a"), Path("/models/tiny"), seed=7)
    assert arguments["args"] == run
    assert (arguments["lora"], arguments["adapter"]) == (LoRAConfig(), None)
    assert arguments["train"] == TrainArgs(batch_size=8, max_steps=2)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if not name.startswith("benchmarks")])
def test_print_config_feeds_back(script: str, tmp_path: Path, capsys) -> None:
    main = load_script(script).main
    needed = []
    try:
        parse(main, needed)
    except UsageError as error:  # --source, --out_dir: required
        names = re.sub(r".*required: | \(--help.*", "", str(error)).split(", ")
        needed = [f"--{name}=a" for name in names]
    for how in ("--print_config", "--print_config=skip_default"):
        with pytest.raises(SystemExit):
            parse(main, [*needed, how])
        file = tmp_path / "config.yaml"
        file.write_text(capsys.readouterr().out)
        assert parse(main, ["--config", str(file)]) == parse(main, needed)
        with pytest.raises(SystemExit):
            parse(main, [how])  # required flags are null there, for the user to fill in
        file.write_text(capsys.readouterr().out)
        assert parse(main, ["--config", str(file), *needed]) == parse(main, needed)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion(tmp_path: Path) -> None:
    script = tmp_path / "a.py"
    script.write_text(
        "# from lit_llama.runtime.cli import run\n"
        "print('  --lora.r INT  rank\\n  --lora.alpha INT  a\\n  --out')"
    )
    for words, expected in (
        ("a.py --lo", "--lora.r --lora.alpha"),
        ("a.py --out o", ""),
        ("b.py --", ""),
    ):
        line = f"source {ROOT}/scripts/completion.bash; COMP_WORDS=({sys.executable} {words})\n"
        line += "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _lit_llama; echo ${COMPREPLY[@]}"
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert (done.stdout.strip(), done.stderr) == (expected, "")


def test_a_run_can_be_repeated_from_its_config(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, call
) -> None:
    flags = f"--checkpoint_dir {tiny_checkpoint} --data_dir {tiny_data} --precision 32-true"
    flags += " --lora.r 4 --train.max_steps 2 --train.batch_size 8 --seed 3 --lora.targets q_proj"
    first, again = tmp_path / "first", tmp_path / "again"
    done = call("finetune/lora.py", *flags.split(), "--out_dir", first)
    assert "done: val loss" in done.stdout, done.stderr
    done = call("finetune/lora.py", "--config", first / "config.yaml", "--out_dir", again)
    assert done.returncode == 0, done.stderr
    loras = [load_file(run / "adapter_model.safetensors") for run in (first, again)]
    assert all(torch.equal(tensor, loras[1][name]) for name, tensor in loras[0].items())
    longer = ["--config", again / "config.yaml", "--train.max_steps", 3, "--resume"]
    done = call("finetune/lora.py", *longer)
    assert done.returncode == 0, done.stderr


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

    for flags in (
        ["--resume"],
        ["--resume", "--name", "a"],
        ["--resume", "true"],
        ["--other", "false"],
    ):
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

    parents = iter([1, 1, 2, 2])
    monkeypatch.setattr(cli.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(cli.os, "_exit", end)
    with pytest.raises(Ended):
        cli.run(failing(UserError("file: wrong")))
    assert capsys.readouterr().err == ""

    # a lost connection is told by whoever notices it: rank 0 may have been killed
    with pytest.raises(SystemExit):
        cli.run(failing(RuntimeError("gloo/pair.cc: Connection closed by peer")))
    assert capsys.readouterr().err == GONE + "\n"


def failing(error: BaseException):
    def main() -> None:
        """Fail."""
        raise error

    return main


MEMORY = "error: GPU out of memory, lower --train.micro_batch_tokens or --max_new_tokens"
GONE = "error: another process of this run has ended. Resume with --resume"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("file: wrong"), 1, "error: file: wrong"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "error: a.txt: No such file"),
        (OSError(28, "No space left on device"), 1, "error: writing: No space left on device"),
        (KeyboardInterrupt(), 130, "error: stopped"),
        (RuntimeError("gloo/pair.cc: Connection closed by peer [127.0.0.1]"), 1, GONE),
        (UserError("--devices 3: too many"), 2, "error: --devices 3: too many"),
        (UsageError("runs: required"), 2, "error: runs: required"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, f"{MEMORY} (CUDA out of memory)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_mistakes_are_one_line(
    monkeypatch, capsys, error: BaseException, status: int, line: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as ended:
        cli.run(failing(error))
    assert ended.value.code == status
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("bug", [ZeroDivisionError(), OSError("odd"), RuntimeError("odd")])
def test_a_bug_keeps_its_traceback(monkeypatch, bug: Exception) -> None:
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(type(bug)):
        cli.run(failing(bug))


def test_reading_flags_does_not_load_torch() -> None:
    modules = "lit_llama.args, lit_llama.runtime.args, lit_llama.runtime.cli"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
