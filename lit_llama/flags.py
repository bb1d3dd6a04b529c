"""The flags of a script, from the types and the docstring of its `main`: how they are read, and what --help says."""

import difflib
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_loader

from lit_llama.errors import UserError
from lit_llama.files import read_text

KINDS = {
    bool: ("true|false", "true or false"),
    int: ("INT", "a whole number"),
    float: ("FLOAT", "a number"),
    Path: ("PATH", "a path"),
    str: ("TEXT", "text"),
}
NUMBER = re.compile(r"[\w.+-]+|~")  # or a word
MAX_CONFIG_BYTES = 10**5
GENERAL = {
    "config": ("--config PATH", "YAML file of flags, such as a run's config.yaml; flags beside it take precedence"),
    "print_config": ("--print_config", "print all flags as such a file, or with =skip_default those that differ"),
    "help": ("--help", "print this"),
}


class WrongCall(UserError):
    """A command line or a --config that is no call of the script."""


class _Words(yaml.BaseLoader):
    """YAML of text alone. No tags, which may make anything, nor aliases, by which a few lines expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if event.anchor or getattr(event, "tag", None):
            raise yaml.YAMLError(f"tags, anchors and aliases are not read,{event.start_mark}")
        return super().compose_node(parent, index)


class _Values(_Words, yaml.SafeLoader):
    """With numbers, truth values and null, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.YAMLError(f"{key.value!r} is there twice,{key.start_mark}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_load = get_loader("yaml")


def _value(text: str) -> Any:
    """What jsonargparse takes a flag's text for: YAML, but text where tags or aliases stand, and where it is none."""
    try:
        # a list has come as JSON
        value = json.loads(text) if text[:1] == "[" else text if re.search("[!&*]", text) else _load(text)
        return text if value is None and text not in ("null", "~") else value  # "# a title" is text too
    except (ValueError, RecursionError, yaml.YAMLError):  # ValueError: a number of thousands of digits
        return text


set_loader("yaml", _value)


def read(main: Callable, words: list[str], positional: str | None = None) -> tuple[dict[str, Any], str]:
    """The arguments for `main`, and all flags as YAML, from the words behind a script's name.

    Words that belong to no flag go to the list `positional`. --help and --print_config print, and end the process.

    Raises:
        WrongCall: a flag that there is not, a value that does not fit it, or none where one is needed.
    """
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")  # for the sake of --print_config, which comes with it
    parser.add_function_arguments(main, as_group=False)
    actions = dict(_actions(parser))
    kinds = {action.dest: action._typehint for action in actions}
    parameters = inspect.signature(main).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    texts = _texts(words, kinds, positional)
    if "help" in texts:
        print(_help(main, actions, needed, positional))
        sys.exit(0)
    given: dict[str, tuple[str, str]] = {}  # name -> where it was found, its value
    for file in texts.get("config", []):
        for name, value in _from_file(file, kinds):
            if value is not None or name not in needed:  # null is what --print_config writes for those
                given[name] = f"{file}: ", _whole(kinds[name], [_yaml(value)]) if value is not None else "null"
    given |= {name: ("--", _whole(kinds[name], own)) for name, own in texts.items() if name in kinds}
    missing = [name for name in needed if name not in given]
    if missing and "print_config" not in texts:
        names = (f"{name} (one or more)" if name == positional else f"--{name}" for name in missing)
        _wrong(f"{', '.join(names)}: needed")
    for name, (where, text) in given.items():
        _check(f"{where}{name}", text, kinds[name])
    arguments = [f"--{name}={text}" for name, (_, text) in given.items()]
    try:
        namespace = parser.parse_args([*arguments, *(f"--print_config={how}" for how in texts.get("print_config", []))])
    except ArgumentError as error:
        for name, (where, text) in given.items():
            if not _fits(kinds[name], text):
                _wrong(f"{where}{name} {text}: should be {_called(kinds[name])[1]}")
        _wrong(str(error))
    values = parser.instantiate(namespace).as_dict()
    return {name: value for name, value in values.items() if name != "config"}, parser.dump(namespace)


def _actions(parser: ArgumentParser) -> Iterator[tuple[Action, str]]:
    """Each flag and the title of its group in --help. The flags of a dataclass that may be None come last."""
    optional = []
    for group in parser._action_groups:
        for action in group._group_actions:
            if not hasattr(action, "_typehint") or action.default == SUPPRESS:
                continue  # is no flag of main's
            prefix = action.dest.rpartition(".")[0]
            if dataclasses := [part for part in get_args(action._typehint) if is_dataclass(part)]:
                optional.append((action, dataclasses[0]))
            else:
                yield action, f"{prefix}: {group.title}" if prefix else "flags"
    for action, dataclass in optional:
        own = ArgumentParser()
        own.add_class_arguments(dataclass, action.dest)
        yield from ((part, f"{action.dest}: {action.help}") for part, _ in _actions(own))


def _texts(words: list[str], kinds: dict[str, Any], positional: str | None) -> dict[str, list[str]]:
    """What each flag was given, in order. `--resume` alone, for a flag that is true or false, is `--resume true`."""
    texts: dict[str, list[str]] = {}
    rest = ["--help" if word == "-h" else word for word in words]
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        switch = kinds.get(name) is bool
        if not word.startswith("-") or " " in name:
            name, text = positional or _wrong(f"{word!r} belongs to no flag. Text with spaces needs quotes"), word
        elif not word.startswith("--") or name not in (*kinds, *GENERAL):
            _unknown("--" * word.startswith("--"), name, kinds)
        elif not equals and (name in kinds or name == "config"):
            # behind a switch, words may also be positional ones
            ends = r"(?!true$|false$)" if switch and positional else r"--\S+$"
            if rest and not re.match(ends, rest[0]):
                text = rest.pop(0)
            else:
                text = "true" if switch else _wrong(f"--{name}: needs a value")
        texts.setdefault(name, []).append(text)
    return texts


def _from_file(file: str, kinds: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """("train.epochs", 5) and so on, whether the file nests them or writes them with a dot."""
    try:
        loaded = yaml.load(read_text(Path(file), max_bytes=MAX_CONFIG_BYTES), _Values)
    except UserError as error:
        _wrong(f"--config {error}")
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date or number that there is not
        _wrong(f"--config {file}: not YAML ({error})")
    if not isinstance(loaded, dict):
        _wrong(f"--config {file}: should hold flags, as --print_config prints them")
    rest, seen = list(loaded.items()), set()
    for name, value in rest:
        if name in seen:  # once nested, once with a dot
            _wrong(f"{file}: {name} is there twice")
        seen.add(name)
        if isinstance(value, dict):
            rest += ((f"{name}.{key}", part) for key, part in value.items())
        elif name in kinds:
            yield name, value
        elif value is not None or not any(known.startswith(f"{name}.") for known in kinds):  # `adapter: null` is fine
            _unknown(f"{file}: ", str(name), kinds)


def _whole(kind: Any, texts: list[str]) -> str:
    """The last value; for a list all of them, so that `--x a --x b` is `--x [a, b]`. In brackets it is YAML."""
    if not _is_list(kind):
        return texts[-1]
    items = []
    for text in texts:
        try:
            items += yaml.load(text, _Words) if re.fullmatch(r"\[.*\]", text, re.DOTALL) else [text]
        except (yaml.YAMLError, RecursionError):
            items.append(text)
    return _yaml(items)


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _check(flag: str, text: str, kind: Any) -> None:
    """Refuse what no flag can hold, and a path that is none, or leads through a file or in a circle."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        _wrong(f"{flag} {text.encode('utf-8', 'replace').decode()}: should be UTF-8")
    kinds, parts = _leaves(kind) - {NoneType, ...}, json.loads(text) if _is_list(kind) and text != "null" else [text]
    for part in parts if text != "null" else ():
        if kinds <= {int, float, bool} and not (isinstance(part, str) and NUMBER.fullmatch(part)):
            _wrong(f"{flag} {text}: should be {_called(kind)[1]}")
        if int in kinds and len(part) > 18:
            _wrong(f"{flag} {text}: should be a whole number of at most 18 digits")
        if Path in kinds:
            try:
                if part == "":
                    _wrong(f"{flag} {text}: is empty, should be a path")
                os.stat(part)
            except FileNotFoundError:
                pass  # may be made
            except (OSError, TypeError, ValueError) as error:
                _wrong(f"{flag} {part}: {getattr(error, 'strerror', None) or 'should be a path'}")


def _leaves(kind: Any) -> set[Any]:
    return {leaf for part in get_args(kind) for leaf in _leaves(part)} or {kind}


def _is_list(kind: Any) -> bool:
    return any(get_origin(part) in (list, tuple) for part in (kind, *get_args(kind)))


def _fits(kind: Any, text: str) -> bool:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        return bool(parser.parse_args([f"--value={text}"]))
    except ArgumentError:
        return False


def _unknown(where: str, name: str, kinds: dict[str, Any]) -> NoReturn:
    """The nearest flag is looked for under its whole name and under the last part of it: --epoch is --train.epochs."""
    names = {full.rpartition(".")[2]: full for full in kinds} | {full: full for full in (*kinds, *GENERAL)}
    inside = [full for full in kinds if full.startswith(f"{name}.")]
    close = [*difflib.get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.7), *inside][:1]
    hint = "".join(f". Did you mean {'--' * (where == '--')}{names[match]}?" for match in close)
    _wrong(f"{where}{name}: no such flag{hint}")


def _wrong(message: str) -> NoReturn:
    raise WrongCall(f"{message} (--help lists all)")


def _called(kind: Any) -> tuple[str, str]:
    """What a type is called in --help, and in an error."""
    parts = [_called(part) for part in get_args(kind) if part not in (type(None), ...)]
    if get_origin(kind) in (list, tuple):
        return f"[{parts[0][0]}, ...]", f"a list, each part of it {parts[0][1]}"
    if parts:
        return "|".join(name for name, _ in parts), " or ".join(name for _, name in parts)
    return KINDS.get(kind, (str(kind), str(kind)))


def _help(main: Callable, actions: dict[Action, str], needed: list[str], positional: str | None) -> str:
    """In one line each where the terminal is wide enough; what `main`'s docstring has under "Example:" comes last."""
    about, _, example = inspect.getdoc(main).split("\n\nArgs:")[0].partition("\n\nExample:\n")
    rows: dict[str, list[tuple[str, str]]] = {"flags": []}
    usage = ""
    for action, title in actions.items():
        name, default, text = action.dest, action.default, action.help.rstrip(".")
        switch = default is False  # --resume alone will do
        flag = f"{name} ..." if name == positional else f"--{name}" + f" {_called(action._typehint)[0]}" * (not switch)
        if name in needed:
            usage += f" {flag}"
            text += " (needed)"
        elif not switch and default not in (None, "", [], ()) and "default" not in text:
            shown = ", ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
            text += f" (default:\xa0{shown.lower() if default is True else shown})"
        rows.setdefault(title.rstrip("."), []).append((flag, text))
    rows["every script"] = list(GENERAL.values())
    columns = shutil.get_terminal_size().columns
    indent = " " * (40 if columns >= 100 else 28)
    lines = [f"usage: python {sys.argv[0]}{usage} [flags]\n", *(textwrap.fill(p, columns) for p in about.split("\n\n"))]
    for title, group in rows.items():
        lines += [f"\n{title}:"] if group else []
        for flag, text in group:
            row = f"  {flag}".ljust(len(indent) - 2) + f"  {text}"
            row = textwrap.fill(row, columns, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
            lines.append(row.replace("\xa0", " "))
    return "\n".join([*lines, *(["\nexamples:", example] if example else [])])
