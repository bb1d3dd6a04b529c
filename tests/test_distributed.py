"""Several processes give what one gives, each with its shard. CPU, gloo, `fully_shard`."""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_hf_model
from safetensors.torch import load_file

from lit_llama.data import pack_micro_batches, split_across_ranks
from lit_llama.storage.run_folder import checkpoints

RECIPE = "--precision 32-true --seed 7 --train.batch_size 24 --train.micro_batch_tokens 300 "
RECIPE += "--train.learning_rate 1e-2 --train.warmup_steps 2 --train.save_interval 5"
METHODS = {
    "lora": ["--lora.dropout", "0.1", "--lora.targets", "[all-linear]", "--lora.use_dora", "true"],
    "adapter": ["--adapter.start_layer", "0"],
    "adapter_v2": ["--adapter.start_layer", "1", "--train.recompute", "activations"],
    "full": ["--train.recompute", "block"],
}


def flags_of(
    method: str, checkpoint: Path, data: Path, out_dir: Path, steps: int = 10
) -> list[str]:
    flags = [
        "--checkpoint_dir",
        str(checkpoint),
        "--data_dir",
        str(data),
        "--out_dir",
        str(out_dir),
    ]
    # one step has fewer micro-batches than processes, others an odd number of them
    flags += [*RECIPE.split(), *METHODS[method], "--train.max_steps", str(steps)]
    return [f"{ROOT}/finetune/{method}.py", *flags]


def environment(**more: str) -> dict[str, str]:
    launched = ("WORLD_SIZE", "LOCAL_RANK", "NODE_RANK")
    kept = {key: value for key, value in os.environ.items() if key not in launched}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def start(*command: str, python: str, **more: str) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([python, *command], env=environment(**more), **pipes)


@pytest.fixture(scope="module")
def forked(python: str) -> Callable[..., subprocess.Popen]:
    """`start` with the Python that starts at once, as do the processes that Fabric starts."""
    return partial(start, python=python)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


def rows_of(out_dir: Path) -> list[dict[str, str]]:
    with (out_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_curve(out_dir: Path, reference: Path) -> None:
    ours, theirs = rows_of(out_dir), rows_of(reference)
    assert (
        [row["step"] for row in ours]
        == [row["step"] for row in theirs]
        == [str(n) for n in range(1, 11)]
    )
    for name in ("loss", "samples", "tokens"):
        one, two = ([float(row[name]) for row in rows] for rows in (ours, theirs))
        torch.testing.assert_close(one, two, atol=1e-4, rtol=0)  # fp32, another order of sums
    assert float(theirs[-1]["loss"]) < float(theirs[0]["loss"]) - 0.1
    assert float(ours[-1]["val_loss"]) == pytest.approx(float(theirs[-1]["val_loss"]), abs=1e-3)


def assert_same_files(out_dir: Path, reference: Path) -> None:
    names = {path.name for path in reference.iterdir() if path.is_file()}
    assert {path.name for path in out_dir.iterdir() if path.is_file()} == names
    (weights,) = (name for name in names if name.endswith(".safetensors"))
    one, two = load_file(out_dir / weights), load_file(reference / weights)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, two[name], atol=2e-3, rtol=0
        )  # ten steps of at most 1e-2 each


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, tiny_checkpoint: Path, tiny_data: Path, forked):
    """The folder of a method's run on one process."""
    folder, done = tmp_path_factory.mktemp("one"), {}

    def get(method: str) -> Path:
        if method not in done:
            done[method] = folder / method
            finish(forked(*flags_of(method, tiny_checkpoint, tiny_data, done[method])))
        return done[method]

    return get


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_what_one_gives(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, one_process, method: str, forked
) -> None:
    output = finish(
        forked(*flags_of(method, tiny_checkpoint, tiny_data, tmp_path / "two"), "--devices", "2")
    )
    assert "on 2 devices" in output
    assert output.count("val loss") == 3  # before, after, the summary: one process speaks
    assert_same_curve(tmp_path / "two", one_process(method))
    assert_same_files(tmp_path / "two", one_process(method))


@pytest.mark.parametrize("method", ["lora", "adapter_v2", "full"])
def test_bf16_computes_the_same_on_two_processes(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, method: str, forked
) -> None:
    curves = []
    for devices in ("1", "2"):
        flags = flags_of(method, tiny_checkpoint, tiny_data, tmp_path / devices, steps=3)
        finish(forked(*flags, "--precision", "bf16-mixed", "--devices", devices))
        curves.append([float(row["loss"]) for row in rows_of(tmp_path / devices)])
    # the micro-batches are equal, and so are roundings; only gradients are summed in another order
    torch.testing.assert_close(curves[0], curves[1], atol=2e-3, rtol=0)
    assert curves[0][0] == pytest.approx(curves[1][0], abs=1e-5)


@pytest.mark.parametrize(
    ("rank", "where"), [(1, "state"), (0, "state"), (0, "result"), (0, "metrics")]
)
def test_a_full_disk_under_one_process_ends_all_with_its_reason(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, rank: int, where: str
) -> None:
    script = tmp_path / "finetune.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            sys.path.insert(0, {str(ROOT / "tests")!r})
            from conftest import load_script
            from lit_llama import training
            from lit_llama.runtime import cli
            from lit_llama.storage.run_folder import RunFolder

            def full_disk(*args, **kwargs):
                raise OSError(28, "No space left on device")

            if int(os.environ.get("LOCAL_RANK", 0)) == {rank}:
                if {where!r} == "state":
                    RunFolder._save_state = full_disk
                elif {where!r} == "result":
                    training.save_methods = full_disk
                else:
                    from pathlib import Path
                    Path.open = full_disk  # of metrics.csv
            cli.run(load_script("finetune/lora.py").main)
            """
        )
    )
    flags = flags_of("lora", tiny_checkpoint, tiny_data, tmp_path / "out", steps=2)[1:]
    flags += ["--devices", "2", "--train.save_interval", "1"]
    # not `forked`: its processes are not children of the first one
    output = finish(start(str(script), *flags, python=sys.executable), 1)
    assert output.count("error: ") == output.count("error: writing: No space left on device") == 1
    assert not checkpoints(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))


def test_torchrun_with_two_nodes_gives_what_one_process_gives(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, one_process
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = flags_of("lora", tiny_checkpoint, tiny_data, tmp_path / "two")
    nodes = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    nodes += ["--master_addr", "127.0.0.1", "--master_port", port]
    flags += ["--num_nodes", "2"]
    processes = [
        start(*nodes, "--node_rank", str(rank), *flags, python=sys.executable) for rank in (0, 1)
    ]
    with ThreadPoolExecutor(2) as pool:  # if one node fails, the other waits: show the first's
        waiting = [pool.submit(finish, process) for process in processes]
        printed = [done.result() for done in as_completed(waiting)]
    assert "".join(printed).count("val loss") == 3  # one process speaks
    assert_same_curve(tmp_path / "two", one_process("lora"))
    assert_same_files(tmp_path / "two", one_process("lora"))


@pytest.mark.parametrize(("method", "devices"), [("lora", "121"), ("lora", "212"), ("full", "212")])
def test_a_run_goes_on_with_another_number_of_processes_and_back(
    tmp_path: Path,
    tiny_checkpoint: Path,
    tiny_data: Path,
    one_process,
    method: str,
    devices: str,
    forked,
) -> None:
    """Stopped by SIGTERM after some steps, twice."""
    flags = flags_of(method, tiny_checkpoint, tiny_data, tmp_path / "parts")
    for number, count in enumerate(devices):
        resume = ["--resume"] if number else []
        more = [*resume, "--devices", count, "--train.log_interval", "1"]
        process = forked(*flags, *more, PYTHONUNBUFFERED="1")
        if number == len(devices) - 1:
            finish(process)
        else:
            read = ""
            while f"step {3 * number + 3}/10" not in read:
                line = process.stdout.readline()
                assert line, read
                read += line
            process.send_signal(signal.SIGTERM)
            output = finish(process, 128 + signal.SIGTERM)
            command = rf"python .*{method}.py.*--resume"
            assert re.search(rf"stopped by SIGTERM after step \d. Resume with: {command}", output)
    assert_same_curve(tmp_path / "parts", one_process(method))
    assert_same_files(tmp_path / "parts", one_process(method))


@pytest.mark.parametrize("victim", ["the second", "the first"])
def test_where_one_process_dies_the_other_ends_and_the_run_can_go_on(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, victim: str, forked
) -> None:
    flags = flags_of("lora", tiny_checkpoint, tiny_data, tmp_path / "out", steps=100_000)
    flags += ["--train.save_interval", "1", "--train.epochs", "100000"]
    flags += ["--train.eval_interval", "100000"]
    process = start(*flags, "--devices", "2", python=sys.executable, PYTHONUNBUFFERED="1")
    for _ in range(1800):
        if len(checkpoints(tmp_path / "out")) > 1:
            break
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if "finetune" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 1
    killed = time.perf_counter()
    os.kill(int(workers[0]) if victim == "the second" else process.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)  # its end: no process holds the pipe any longer
    assert time.perf_counter() - killed < 60  # not a timing: the promise is a limit
    assert process.returncode != 0
    assert "error: " in output or "terminated with code" in output, output
    left = Path(f"/proc/{workers[0]}/stat")
    # gone, or a zombie that nobody has waited for
    assert not left.exists() or ") Z " in left.read_text()
    reached = int(checkpoints(tmp_path / "out")[-1].name.removeprefix("step-"))
    flags[flags.index("--train.max_steps") + 1] = str(reached + 3)
    output = finish(forked(*flags, "--devices", "2", "--resume"))
    assert f"resuming after step {reached}" in output
    assert [int(row["step"]) for row in rows_of(tmp_path / "out")] == list(range(1, reached + 4))


def test_each_process_holds_its_part_of_the_weights_and_no_more_while_loading(
    tmp_path: Path, forked
) -> None:
    model = make_hf_model(
        vocab_size=16384, hidden_size=512, intermediate_size=2048, num_hidden_layers=4
    )
    model.save_pretrained(tmp_path / "model")
    script = tmp_path / "measure.py"
    script.write_text(
        textwrap.dedent(
            """
            import re, sys, threading, time
            from pathlib import Path
            import torch
            from lit_llama.runtime.devices import setup_fabric, setup_model
            from lit_llama.storage.model_folder import empty_model
            from lit_llama.storage.shards import local_shard

            def private_bytes():
                status = Path("/proc/self/status").read_text()
                return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024

            def watch():
                global peak
                while True:
                    peak = max(peak, private_bytes())
                    time.sleep(0.0005)

            fabric = setup_fabric(2, 1, "32-true")
            peak = start = private_bytes()
            threading.Thread(target=watch, daemon=True).start()
            model = empty_model(sys.argv[1], torch.float32).requires_grad_(True)
            model = setup_model(fabric, model, sys.argv[1])
            sizes = [p.numel() * p.element_size() for p in model.parameters()]
            held = sum(local_shard(p).numel() * p.element_size() for p in model.parameters())
            # in one write: the processes share a pipe
            sys.stdout.write(f"sizes {sum(sizes)} {max(sizes)} {held} {peak - start}\\n")
            sys.stdout.flush()
            """
        )
    )
    output = finish(forked(str(script), str(tmp_path / "model")))
    found = re.findall(r"sizes (\d+) (\d+) (\d+) (\d+)", output)
    assert len(found) == 2, output
    for values in found:
        whole, largest, held, peak = map(int, values)
        assert whole > 1.3e8
        assert abs(held - whole / 2) < 0.01 * whole
        assert peak < whole / 2 + largest + 2e7  # 20 MB of what Python and torch allocate beside it
        assert peak < whole


def test_shares_of_a_step_are_all_of_it_and_equally_many() -> None:
    lengths = [50, 20, 90, 10, 70, 30, 60, 80]
    whole = pack_micro_batches(range(8), lengths, 100)
    for world_size in (1, 2, 3, 7):
        shares = [split_across_ranks(whole, rank, world_size) for rank in range(world_size)]
        assert len({len(part) for part in shares}) == 1
        assert sorted(ids for part in shares for ids in part if ids) == sorted(whole)


def test_wrong_numbers_of_processes_are_one_line(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, forked
) -> None:
    flags = flags_of("lora", tiny_checkpoint, tiny_data, tmp_path / "out")
    torchrun = dict(TORCHELASTIC_RUN_ID="1", WORLD_SIZE="3", RANK="0", LOCAL_RANK="0")
    for more, env, message in (
        (["--devices", "0"], {}, "--devices 0: should be INT >0"),
        (["--devices", "2"], torchrun, "--devices 2 --num_nodes 1: You set `devices=2`"),
        (["--num_nodes", "2"], {}, "--num_nodes 2: on each node, set MASTER_ADDR"),
    ):
        lines = finish(forked(*flags, *more, **env), 2).splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()
