"""What every script's command line has in common: `main` is called with its flags, and mistakes are one line."""

import os
import re
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import torch

from lit_llama.errors import UserError
from lit_llama.flags import WrongCall, read

_flags = ""


def run(main: Callable, positional: str | None = None) -> None:
    """Call `main` with the command line's flags; its signature and docstring declare them.

    `positional` names a list of `main`'s: words that belong to no flag go there. A mistake of the user's ends in one
    line on stderr: exit status 2 for a wrong call, 1 for anything else, 130 for Ctrl-C. A bug keeps its traceback.
    """
    global _flags
    try:
        arguments, _flags = read(main, sys.argv[1:], positional)
        main(**arguments)
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            _wait_for_first_process()
        _fail(str(error), 2 if isinstance(error, WrongCall) or str(error).startswith("--") else 1)
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


def used_flags() -> str:
    """YAML of every flag of the command line that `run` read, defaults included; `--config` takes it back."""
    return _flags


def _fail(message: str, status: int = 1) -> NoReturn:
    print(f"error: {UserError(message)}", file=sys.stderr)
    raise SystemExit(status) from None
