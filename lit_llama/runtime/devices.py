"""Devices: one, or several processes with sharded weights (FSDP2), through Lightning Fabric."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.wrappers import _FabricModule

from lit_llama.errors import UsageError, UserError
from lit_llama.model import LLaMA
from lit_llama.runtime.args import RunArgs, TrainArgs
from lit_llama.runtime.hardware import default_device
from lit_llama.storage.datasets import Dataset
from lit_llama.storage.model_folder import load_weights
from lit_llama.storage.shards import shard

TIMEOUT = timedelta(minutes=30)  # rank 0 may write tens of GB while the others wait


def check_gpu(precision: str) -> None:
    """Raise UsageError if the GPU has no bf16."""
    name = torch.cuda.get_device_name()
    if precision.startswith("bf16") and not torch.cuda.is_bf16_supported(False):
        hint = "Pass --precision 32-true, and --quantize nf4 if memory is short (no fp16)"
        raise UsageError(f"--precision {precision}: {name} has no bf16, Ampere was first. {hint}")


def setup_fabric(devices: int, num_nodes: int, precision: str) -> Fabric:
    """Create and launch Fabric. Returns in every process."""
    world_size = devices * num_nodes
    for name in ("lightning.pytorch", "lightning.fabric.utilities.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # free the bf16 copy of a trained weight after each use
    torch.set_autocast_cache_enabled(False)
    strategy = "auto"
    if world_size > 1:
        # `setup_model` shards; Fabric's own hook would have to load the weights as well
        strategy = ModelParallelStrategy(lambda model, _: model, world_size, 1, timeout=TIMEOUT)
    # Fabric's bf16-true would round the parameters that methods add in fp32
    plugin = "32-true" if precision == "bf16-true" else precision
    try:
        fabric = Fabric(strategy=strategy, devices=devices, num_nodes=num_nodes, precision=plugin)
        environment = getattr(fabric.strategy, "cluster_environment", None)
        starts_processes = isinstance(environment, LightningEnvironment)
        addresses = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}
        if num_nodes > 1 and starts_processes and not addresses <= os.environ.keys():
            hint = "set MASTER_ADDR, MASTER_PORT and NODE_RANK, or use torchrun or SLURM"
            raise UsageError(f"--num_nodes {num_nodes}: on each node, {hint}")
        if environment is not None:  # Fabric itself does not check what torchrun has started
            environment.validate_settings(devices, num_nodes)
        fabric.launch()
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        # more devices than there are, or other numbers than those of torchrun or SLURM
        raise UsageError(f"--devices {devices} --num_nodes {num_nodes}: {error}") from None
    if default_device().type == fabric.device.type == "cuda":
        check_gpu(precision)
    if starts_processes and fabric.local_rank > 0:
        threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    return fabric


def check_memory(
    fabric: Fabric, model: LLaMA, dataset: Dataset, args: RunArgs, train: TrainArgs
) -> None:
    """Print a line if a GPU is idle, has too little free memory, or enough to be faster."""
    if fabric.device.type == "cuda" and fabric.is_global_zero:
        count = torch.cuda.device_count()
        if fabric.world_size == 1 and count > 1 and not args.quantize:
            print(f"1 of {count} GPUs is used. For all of them: --devices {count}", file=sys.stderr)
        from lit_llama.runtime.memory import memory_advice  # slow to import, and for GPUs only

        free, _ = torch.cuda.mem_get_info(fabric.device)
        longest = max(dataset.train.lengths)
        if line := memory_advice(model, longest, args, train, fabric.world_size, free):
            print(line, file=sys.stderr, flush=True)


def _exit_with_parent(parent: int) -> None:
    """End this process if its parent has died: it might wait for hours in a collective."""
    while os.getppid() == parent:
        time.sleep(2)
    print("error: the main process has ended, and so does this one", file=sys.stderr, flush=True)
    os._exit(1)


def setup_model(
    fabric: Fabric, model: LLaMA, checkpoint_dir: str | Path, quantize: str | None = None
) -> _FabricModule:
    """Shard the model if there are several processes, load its weights, and set up Fabric."""
    if fabric.world_size > 1:
        if quantize:
            raise UsageError(f"--quantize {quantize}: works on one device only")
        shard(model, fabric.strategy.device_mesh)
    packed = getattr(model, "packs_weights", False) and fabric.world_size == 1
    load_weights(model, checkpoint_dir, fabric.device, quantize, packed)
    if fabric.world_size == 1:
        model.to(fabric.device)  # what methods have added, without Fabric's warning that it moves
    return fabric.setup_module(model, move_to_device=False)


@contextmanager
def sync_errors(fabric: Fabric) -> Iterator[None]:
    """Raise the error of one process (UserError, OSError or SystemExit) in all of them.

    Collectives inside the block need blocks of their own: a process that has failed waits for the
    others at the end of its innermost block.
    """
    error = None
    try:
        yield
    except (UserError, OSError, SystemExit) as caught:
        error = caught
    rank = fabric.world_size if error is None else fabric.global_rank
    failed = int(fabric.all_reduce(torch.tensor(rank, device=fabric.device), reduce_op="min"))
    if failed < fabric.world_size:
        raise fabric.broadcast(error, failed)


def on_rank_zero(fabric: Fabric, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in process 0, with `sync_errors`, and broadcast its result."""
    result = None
    with sync_errors(fabric):
        if fabric.is_global_zero:
            result = function(*args)
    return fabric.broadcast(result)


def shutdown(fabric: Fabric) -> None:
    """Wait for all processes, then close their connections."""
    if fabric.world_size > 1:
        fabric.barrier()
        torch.distributed.destroy_process_group()


class StopSignals:
    """Defer SIGTERM and SIGINT (Ctrl-C) to the end of the step; a second signal terminates."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.received = fabric, 0
        self.handlers: dict[int, Any] = {}  # those from before, by signal

    def __enter__(self) -> "StopSignals":
        # Python allows signal handlers in the main thread only
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.__exit__()
        self.received = number
        message = f"{signal.Signals(number).name}: finishing this step (again: stop at once)"
        print(message, file=sys.stderr, flush=True)

    def agreed(self) -> int:
        """Return the signal that any process has received, else 0: all stop after the same step."""
        if self.fabric.world_size == 1:
            return self.received  # without waiting for the GPU
        number = torch.tensor(float(self.received), device=self.fabric.device)
        return int(self.fabric.all_reduce(number, reduce_op="max"))
