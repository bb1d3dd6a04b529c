"""Where a run computes: one device, or several with every parameter sharded over them (FSDP2), through Fabric."""

import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lit_llama.errors import UserError
from lit_llama.files import replacing
from lit_llama.model import LLaMA

# On the CPU each new number of tokens costs megabytes of prepared oneDNN kernels, of which it keeps 1,024, and
# padding-free micro-batches have a new one each step. Read at the first matmul.
for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "64")

PRECISIONS = {"bf16-mixed": torch.bfloat16, "32-true": torch.float32, "bf16-true": torch.bfloat16}
"""What `--precision` may be, and the dtype that weights are loaded in. What a method adds is fp32 under each."""

TIMEOUT = timedelta(minutes=30)  # of one collective operation: rank 0 may write tens of GB meanwhile, and sum them


def make_fabric(
    devices: int,
    num_nodes: int,
    precision: str,
    parallelize: Callable[[LLaMA, DeviceMesh], LLaMA] = lambda model, _: model,
) -> Fabric:
    """A launched Fabric on the accelerator there is; with several devices, this process is one of as many from here on.

    They are started by Fabric itself, unless torchrun or SLURM has done so; `parallelize` spreads a model over them in
    `setup_module`. Raises UserError for more devices than there are, or another number than was started.
    """
    for flag, value in (("devices", devices), ("num_nodes", num_nodes)):
        if value < 1:
            raise UserError(f"--{flag} {value}: should be at least 1")
    # processes on the CPU may be more than its cores, in a test
    most = torch.cuda.device_count() if torch.cuda.is_available() else max(8, os.cpu_count() or 1)
    if devices > most:
        raise UserError(f"--devices {devices}: should be at most {most} on this machine")
    world_size = devices * num_nodes
    if (started := int(os.environ.get("WORLD_SIZE", world_size))) != world_size:
        raise UserError(f"--devices {devices} --num_nodes {num_nodes}: torchrun has started {started} processes")
    for name in ("lightning.pytorch", "lightning.fabric.utilities.distributed"):  # our lines say as much
        logging.getLogger(name).setLevel(logging.WARNING)
    # a trained weight's bf16 copy lives while it is needed, not until all layers are through
    torch.set_autocast_cache_enabled(False)
    strategy = "auto"
    if world_size > 1:
        strategy = ModelParallelStrategy(parallelize, world_size, 1, timeout=TIMEOUT)
    # bf16-true needs nothing of Fabric, whose own would round what is fp32 on purpose
    computing = "32-true" if precision == "bf16-true" else precision
    try:
        fabric = Fabric(
            accelerator="auto", devices=devices, num_nodes=num_nodes, precision=computing, strategy=strategy
        )
    except (ValueError, RuntimeError) as error:  # SLURM's settings and ours disagree
        raise UserError(f"--devices {devices} --num_nodes {num_nodes}: {error}") from None
    try:
        starts_itself = isinstance(getattr(fabric.strategy, "cluster_environment", None), LightningEnvironment)
        if num_nodes > 1 and starts_itself and not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= os.environ.keys():
            hint = "set MASTER_ADDR, MASTER_PORT and NODE_RANK, or use torchrun or SLURM (howto/multi_node.md)"
            raise UserError(f"--num_nodes {num_nodes}: on each node, {hint}")
        fabric.launch()
    except ValueError as error:  # SLURM's settings and ours disagree
        raise UserError(f"--devices {devices} --num_nodes {num_nodes}: {error}") from None
    if starts_itself and fabric.local_rank > 0:
        threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    return fabric


def shard(model: LLaMA, mesh: DeviceMesh) -> None:
    """Cut each block's parameters, and the rest's, into one part of their rows per device (FSDP2, `fully_shard`).

    Whole weights exist one block at a time, the next one's underway meanwhile. Frozen bf16 and trained fp32 parameters
    stand side by side; each travels in its own dtype and autocast chooses what to compute in, as on one device, so that
    the numbers are the same. Gradients are summed in fp32.
    """
    # the rotary table must come through in fp32
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh["data_parallel"], mp_policy=policy)
    for layer, following in pairwise(model.layers):
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])


def local_rows(parameter: Tensor) -> slice:
    """Which rows of the whole parameter this process holds: all, or those of its shard."""
    rows = parameter.size(0)
    if not isinstance(parameter, DTensor):
        return slice(0, rows)
    mesh = parameter.device_mesh
    share = -(-rows // mesh.size())  # as torch.chunk cuts them
    first = min(mesh.get_local_rank() * share, rows)
    return slice(first, min(first + share, rows))


def local_part(parameter: Tensor) -> Tensor:
    """The rows of `local_rows` as a plain tensor that shares their memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def place_like(parameter: Tensor, tensor: Tensor, device: str | torch.device) -> Tensor:
    """A whole CPU tensor as a value for `parameter`: its shard where that is sharded, on `device`, in its dtype.

    A parameter that trains gets memory of its own; a frozen one may share that of `tensor`.
    """
    part = tensor[local_rows(parameter)].to(device=device, dtype=parameter.dtype, copy=parameter.requires_grad)
    if not isinstance(parameter, DTensor):
        return part
    shape = dict(shape=parameter.shape, stride=parameter.stride())
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, run_check=False, **shape)


def whole_tensors(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """Each parameter whole, on the CPU, one after the other. All processes must go through all of them together."""
    for name, parameter in parameters:
        parameter = parameter.detach()
        yield name, (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).cpu()


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """Leave the block when all processes have: where one ended in a UserError or OSError, the others end, quietly.

    What needs all processes inside the block must stand in a block of its own: a process that has failed goes to the
    end of its innermost one, where the others must arrive too.
    """
    error = None
    try:
        yield
    except (UserError, OSError, SystemExit) as caught:
        error = caught
    failures = fabric.all_reduce(torch.tensor(float(error is not None), device=fabric.device), reduce_op="sum")
    if error is not None:
        raise error
    if failures > 0:
        raise SystemExit(1)


@contextmanager
def writing_together(fabric: Fabric, folder: Path) -> Iterator[Path]:
    """A temporary folder that all processes write into, which then becomes `folder`: whole, or not at all."""
    with ExitStack() as stack:
        temporary = None
        with together(fabric):
            if fabric.is_global_zero:
                temporary = stack.enter_context(replacing(folder))
                temporary.mkdir()
        temporary = fabric.broadcast(temporary)
        with together(fabric):
            yield temporary
        with together(fabric):
            stack.close()


def leave_together(fabric: Fabric) -> None:
    """Close the processes' connections once all have come here: none goes while another still waits for its data."""
    if fabric.world_size > 1:
        fabric.barrier()
        torch.distributed.destroy_process_group()


def end_with_parent(parent: int) -> None:
    """End this process once the one that has started it is gone: in a collective it might wait for hours."""
    while os.getppid() == parent:
        time.sleep(2)
    print("error: the main process of the run has ended, and so does this one", file=sys.stderr, flush=True)
    os._exit(1)


def inference_dtype(precision: str) -> torch.dtype:
    """The dtype of all weights when decoding. Raises UserError for an unknown precision."""
    known = {"bf16-true": torch.bfloat16, "32-true": torch.float32}
    if precision not in known:
        raise UserError(f"--precision {precision}: unknown. Known: {', '.join(known)}")
    return known[precision]


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: allocated on the GPU, or resident on the host where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
