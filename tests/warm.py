"""A Python that starts at once: it forks from a process that has imported the libraries already.

`start(folder)` returns the path of an executable that takes `script.py ...`, `-m module ...` or
`-c code ...` as `python` does, with the environment, working folder and streams that it is called
with. It passes on SIGTERM and SIGINT. It is for tests that need processes of their own, but are not
about how Python starts or what its process number is.
"""

import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
from pathlib import Path

PRELOADED = (
    "lit_llama.fast.decoding",
    "lit_llama.generation",
    "lit_llama.training",
    "torchmetrics.functional.text",
)

LAUNCHER = """#!{python} -IS
import json, os, signal, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ), sys.argv[0]]).encode()
socket.send_fds(server, [len(call).to_bytes(8, "little")], [0, 1, 2])
server.sendall(call)
answers = server.makefile("r")
process = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(process, number))
status = int(answers.readline())
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def start(folder: Path) -> tuple[str, subprocess.Popen]:
    """The executable, and the process that it forks from, which ends with this one."""
    # an abstract address: the path of a file might be too long for a socket
    address = f"\0lit-llama-tests-{os.getpid()}"
    launcher = folder / "python"
    launcher.write_text(LAUNCHER.format(python=sys.executable, address=address))
    launcher.chmod(0o700)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    serve = [sys.executable, __file__, json.dumps(address)]
    server = subprocess.Popen(serve, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    server.stdout.readline()  # it listens
    return str(launcher), server


def serve(address: str) -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(16)
        print(flush=True)
        # stdin closes when the process that has started this one is gone
        while 0 not in select.select([listening, 0], [], [])[0]:
            caller, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(caller)
                os._exit(0)
            caller.close()


def answer(caller: socket.socket) -> None:
    """Run what a launcher asks for, and tell it how that ended."""
    length, streams, _, _ = socket.recv_fds(caller, 8, 3)
    with caller.makefile("rb") as stream:
        call = stream.read(struct.unpack("<Q", length)[0])
    words, folder, environment, launcher = json.loads(call)
    if child := os.fork():
        caller.sendall(f"{child}\n".encode())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        caller.sendall(f"{status}\n".encode())
        return
    caller.close()
    status = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        modes = ("r", "w", "w")
        files = (open(n, modes[n], buffering=1, closefd=False) for n in range(3))  # noqa: SIM115
        sys.stdin, sys.stdout, sys.stderr = files
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.executable = launcher
        for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
            del sys.modules[name]  # which has read its settings from another environment already
        run(words)
        status = 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(words: list[str]) -> None:
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
