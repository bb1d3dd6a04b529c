"""Sharding of a model over processes by FSDP2: each holds a part of the rows of every parameter."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# torch.distributed is imported where it is used: it takes half a second, and few need it


def shard(model: nn.Module, mesh: "DeviceMesh") -> None:
    """Shard each block, and the rest of the model, with `fully_shard`.

    Parameters are gathered in their own dtype and autocast chooses the dtype to compute in, as on
    one device, so that the numbers are equal. Gradients are reduced in fp32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # casting the inputs of a block would round the rotary table
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh["data_parallel"], mp_policy=policy)


def is_sharded(parameter: Tensor) -> bool:
    """Tell whether this is a DTensor."""
    return hasattr(parameter, "device_mesh")


def local_rows(parameter: Tensor) -> slice:
    """Return the rows of the full parameter that this process holds."""
    rows = len(parameter)
    if not is_sharded(parameter):
        return slice(0, rows)
    mesh = parameter.device_mesh
    rows_per_rank = -(-rows // mesh.size())  # as torch.chunk splits
    start = min(mesh.get_local_rank() * rows_per_rank, rows)
    return slice(start, min(start + rows_per_rank, rows))


def local_shard(parameter: Tensor) -> Tensor:
    """Return the rows of `local_rows` as a plain tensor that shares their memory."""
    return parameter.to_local() if is_sharded(parameter) else parameter


def shard_like(parameter: Tensor, tensor: Tensor, device: str | torch.device) -> Tensor:
    """Shard and convert a full CPU tensor like `parameter`. Frozen weights may share its memory."""
    rows = tensor[local_rows(parameter)]
    rows = rows.to(device, parameter.dtype, copy=parameter.requires_grad)
    if not is_sharded(parameter):
        return rows
    from torch.distributed.tensor import DTensor

    shape = dict(shape=parameter.shape, stride=parameter.stride())
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, **shape)


def gather_full_tensors(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Gather one full parameter at a time on the CPU. All processes must iterate together."""
    for name, parameter in parameters:
        tensor = parameter.detach()
        yield name, (tensor.full_tensor() if is_sharded(tensor) else tensor).cpu()
