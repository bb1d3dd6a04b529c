"""Command line: `run(main)` reads the flags that main's signature and docstring declare.

jsonargparse checks the types and prints configs. This layer turns words and --config files into
`flag -> text`: bare switches (`--resume`), lists, suggestions for misspelled flags. It prints
errors as one line, and a compact --help.
"""

import difflib
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
import time
from argparse import SUPPRESS, Action
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_loader

from lit_llama.errors import UsageError, UserError
from lit_llama.runtime import environment  # sets variables, before torch is imported

TYPES = {bool: "true|false", int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}
SEE_HELP = "(--help lists all flags)"
EVERY_SCRIPT = """
every script:
  --config PATH                     Read flags from a YAML file
  --print_config                    Print all flags as YAML
  --help                            Print this help"""

# values are JSON, else text: as YAML, `--prompt "# title"` would be a comment and become null
set_loader("yaml", json.loads, exceptions=(ValueError,))


def run(main: Callable, positional: str | None = None) -> None:
    """Call `main` with the flags of the command line.

    The fields of main's parameter `args`, a dataclass, become flags without a prefix. Words that
    follow no flag go to the list `positional`. Exit status: 2 for a wrong call, else 1.
    """
    try:
        arguments = parse(main, sys.argv[1:], positional)
        environment.set_wait_policy()
        main(**arguments)
    except (Exception, KeyboardInterrupt) as error:
        message = _explain(error)
        if message is None:
            raise
        # all processes make a user's mistake alike: let rank 0, which started them, print it alone
        parent = os.getppid()
        alike = int(os.environ.get("LOCAL_RANK", 0)) > 0 and not isinstance(error, RuntimeError)
        for _ in range(100 if alike else 0):
            time.sleep(0.1)
            if os.getppid() != parent:
                os._exit(1)
        print(f"error: {UserError(message)}", file=sys.stderr)
        wrong_call = isinstance(error, UsageError) or message.startswith("--")
        status = 130 if isinstance(error, KeyboardInterrupt) else 2 if wrong_call else 1
        raise SystemExit(status) from None


def _explain(error: BaseException) -> str | None:
    """Return the message of an expected error, None for a bug."""
    if isinstance(error, UserError | KeyboardInterrupt):
        return str(error) or "stopped"
    if type(error).__name__ == "OutOfMemoryError":  # torch's; a wrong call must not import torch
        hint = "lower --train.micro_batch_tokens or --max_new_tokens"
        return f"GPU out of memory, {hint} ({str(error).split('.')[0]})"
    if isinstance(error, OSError) and (error.filename or error.errno):
        return f"{error.filename or 'writing'}: {error.strerror}"
    lost_peer = "Connection (closed|reset)|Broken pipe|remote process exited"
    if isinstance(error, RuntimeError) and re.search(lost_peer, str(error)):
        return "another process of this run has ended. Resume with --resume"
    return None


def parse(main: Callable, words: list[str], positional: str | None = None) -> dict[str, Any]:
    """Return main's arguments. Raises UsageError for unknown flags and invalid values."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")  # also adds --print_config
    shared = getattr(inspect.signature(main).parameters.get("args"), "default", None)
    if shared:
        parser.add_class_arguments(type(shared), default=vars(shared))
    parser.add_function_arguments(main, as_group=False, skip={"args"})
    flags = _flags(parser)
    if "-h" in words or "--help" in words:
        print(_help(main, flags, positional))
        sys.exit(0)

    command = _read_words(words, flags, positional)
    given: dict[str, list[str]] = {}
    for file in command.pop("config", []):
        try:
            given |= _read_words(_read_config(file), flags)
        except (OSError, ValueError, yaml.YAMLError, UsageError) as error:
            raise UsageError(f"--config {file}: {error}") from None
    given |= command
    values = {name: texts[-1] for name, texts in given.items()}
    for name in given.keys() & flags.keys():
        if values[name] == "null" and flags[name].default is None:
            del values[name]  # a required flag, as --print_config prints it, stays missing
        elif flags[name].metavar.startswith("["):
            values[name] = json.dumps([item for text in given[name] for item in _items(text)])
    try:
        namespace = parser.parse_args([f"--{name}={value}" for name, value in values.items()])
    except ArgumentError as error:
        # the message names the flag by one key for each level
        name = ".".join(re.findall(r'Parser key "([\w.]+)"', str(error)))
        if name not in flags:
            raise UsageError(f"{error} {SEE_HELP}") from None
        limit = "".join(re.findall("restriction (.*)", str(error))).replace("v", " ")
        problem = f"should be {flags[name].metavar}{limit}"
        raise UsageError(f"--{name} {values[name]}: {problem} {SEE_HELP}") from None
    arguments = parser.instantiate(namespace).as_dict()
    del arguments["config"]
    if shared:
        arguments["args"] = type(shared)(**{name: arguments.pop(name) for name in vars(shared)})
    return arguments


def _flags(parser: ArgumentParser) -> dict[str, Action]:
    """Return the flags by name, with those of optional groups (`adapter: AdapterConfig | None`)."""
    flags = {}
    for action in parser._actions:
        if not hasattr(action, "_typehint") or action.default == SUPPRESS:
            continue
        action.metavar = _type_name(action._typehint)
        flags[action.dest] = action
        for kind in filter(is_dataclass, get_args(action._typehint)):
            group = ArgumentParser()
            group.add_class_arguments(kind, action.dest)
            group._action_groups[-1].title = action.help
            flags |= _flags(group)
            action.help = SUPPRESS
    return flags


def _type_name(kind: Any) -> str:
    """Return a readable name of a type: INT, PATH, cosine|constant, [TEXT, ...]."""
    parts = [_type_name(part) for part in get_args(kind) if part not in (NoneType, ...)]
    if get_origin(kind) in (list, tuple):
        return f"[{parts[0]}, ...]"
    base = getattr(kind, "_type", kind)  # int of PositiveInt
    return "|".join(parts) or TYPES.get(base, getattr(base, "__name__", str(base)))


def _read_words(words: list[str], flags: dict[str, Action], positional: str | None = None) -> dict:
    """Return the texts given for each flag: {"lora.r": ["8"], "runs": ["a", "b"]}."""
    names = [*flags, "config", "print_config", "help"]
    given: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("-"):
            if positional is None:
                raise UsageError(f"{word!r} belongs to no flag. Text with spaces needs quotes")
            name, text = positional, word
        elif not word.startswith("--") or name not in names:
            ends = {known.rpartition(".")[2]: known for known in names}  # --epoch: --train.epochs
            ends |= {known: known for known in names}
            similar = difflib.get_close_matches(name.replace("-", "_"), ends, n=1, cutoff=0.7)
            hint = f". Did you mean --{ends[similar[0]]}?" if similar else ""
            raise UsageError(f"{word.partition('=')[0]}: no such flag{hint} {SEE_HELP}")
        elif not equals and name != "print_config":
            is_switch = name in flags and flags[name].metavar == TYPES[bool]
            if is_switch and (not rest or rest[0].lower() not in ("true", "false", "yes", "no")):
                text = "true"
            elif not rest or rest[0].startswith("--"):
                raise UsageError(f"--{name}: needs a value {SEE_HELP}")
            else:
                text = rest.pop(0)
        given.setdefault(name, []).append(text)
    return given


def _read_config(file: str) -> list[str]:
    """Return the flags of a YAML file as words. Its keys may be nested or dotted."""
    # BaseLoader keeps all values as the text that they are
    config = yaml.load(Path(file).read_text("utf-8"), yaml.BaseLoader)  # noqa: S506
    if not isinstance(config, dict):
        raise UsageError("should contain flags, as --print_config prints them")
    words = []
    items = list(config.items())  # grows by the items of nested groups
    for name, value in items:
        if isinstance(value, dict):
            items += [(f"{name}.{key}", item) for key, item in value.items()]
        else:
            texts = value if isinstance(value, list) else [value]
            words += [f"--{name}={text}" for text in texts or ["[]"]]
    return words


def _items(text: str) -> list[str]:
    """Return the items of a list flag's value: `[q_proj, v_proj]`, or one without brackets."""
    if not re.fullmatch(r"\[.*\]", text):
        return [text]
    return [item.strip(" '\"") for item in text[1:-1].split(",") if item.strip()]


def _help(main: Callable, flags: dict[str, Action], positional: str | None) -> str:
    """Return the text of --help. The Example section of main's docstring comes last."""
    about, _, example = inspect.getdoc(main).split("\n\nArgs:")[0].partition("\n\nExample:\n")
    words = f"{positional} ... " if positional else ""
    lines = [f"usage: python {sys.argv[0]} {words}[flags]", "", about]
    width = shutil.get_terminal_size().columns
    title = None
    for name, flag in flags.items():
        if flag.help == SUPPRESS:
            continue
        if flag.container.title != title:
            title = flag.container.title
            lines += ["", f"{title}:".replace(".:", ":")]
        call = f"--{name}" if flag.default is False else f"--{name} {flag.metavar}"
        text = (flag.help or "").rstrip(".")
        default = flag.default if isinstance(flag.default, (list, tuple)) else [flag.default]
        if flag.required and flag.default is None:
            text += " (required)"
        elif str(flag.default) not in ("None", "False", "") and "default" not in text:
            text += f" (default: {', '.join(map(str, default))})" if default else ""
        row = f"  {call:32}  {text}"
        lines.append(textwrap.fill(row, width, subsequent_indent=" " * 36))
    lines.append(EVERY_SCRIPT)
    return "\n".join(lines + (["", "examples:", example] if example else []))
