"""What every script's command line has in common: flags from a typed `main`, and errors in one line."""

import inspect
import os
import re
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import torch
from jsonargparse import ArgumentError, ArgumentParser

from lit_llama.errors import UserError

_flags = ""


def run(main: Callable) -> None:
    """Call `main` with the command line's flags; its signature and docstring declare them.

    A mistake of the user's ends in one line on stderr: exit status 2 for a wrong call, 1 for anything else, 130 for
    Ctrl-C. A bug keeps its traceback.
    """
    global _flags
    parser = ArgumentParser(description=inspect.getdoc(main).split("\n\nArgs:")[0], exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with flags; --print_config shows one.")
    parser.add_function_arguments(main, as_group=False)
    try:
        flags = parser.parse_args(_spelled_out(sys.argv[1:], parser))
        _flags = parser.dump(flags)
        arguments = parser.instantiate(flags).as_dict()
        main(**{name: value for name, value in arguments.items() if name != "config"})
    except ArgumentError as error:
        _fail(f"{' '.join(str(error).split())} (--help lists the flags)", 2)
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            _wait_for_first_process()
        _fail(str(error), 2 if str(error).startswith("--") else 1)
    except torch.OutOfMemoryError as error:
        _fail(
            f"GPU memory is used up, lower --train.micro_batch_tokens or --max_new_tokens ({str(error).split('.')[0]})"
        )
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _fail(f"{error.filename or 'writing'}: {error.strerror}")
    except RuntimeError as error:
        if not re.search("Connection (closed|reset)|Broken pipe|remote process exited", str(error)):
            raise
        _fail("another process of this run has ended, and so does this one. Go on with --resume")
    except KeyboardInterrupt:
        _fail("stopped", 130)
    finally:
        _flags = ""


def _wait_for_first_process(seconds: float = 10) -> None:
    """End with the process that has started this one: nearly always it says the same. If it lives on, return."""
    parent = os.getppid()
    for _ in range(round(seconds * 10)):
        time.sleep(0.1)
        if os.getppid() != parent:
            os._exit(1)


def _spelled_out(words: list[str], parser: ArgumentParser) -> list[str]:
    """`--resume` alone, for a flag that is true or false, as `--resume true`."""
    actions = (action for action in parser._actions if getattr(action, "_typehint", None) is bool)
    switches = {flag for action in actions for flag in action.option_strings}
    following = [*words[1:], "--"]
    return [
        part
        for word, after in zip(words, following, strict=False)
        for part in ([word, "true"] if word in switches and after.startswith("--") else [word])
    ]


def used_flags() -> str:
    """YAML of every flag of the command line that `run` read, defaults included; `--config` takes it back."""
    return _flags


def _fail(message: str, status: int = 1) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status) from None
