"""Where a run computes: Fabric on one device."""

import logging
import os
import resource

import torch
from lightning.fabric import Fabric

from lit_llama.errors import UserError

# On the CPU each new number of tokens costs megabytes of prepared oneDNN kernels, of which it keeps 1,024, and
# padding-free micro-batches have a new one each step. Read at the first matmul.
for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "64")

PRECISIONS = {"bf16-mixed": torch.bfloat16, "32-true": torch.float32}
"""What `--precision` may be, and the dtype of frozen weights under it. Trained weights are fp32."""


def make_fabric(devices: int, num_nodes: int, precision: str) -> Fabric:
    """A launched Fabric on the accelerator there is. Raises UserError for an unknown precision or too many devices."""
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: unknown. Known: {', '.join(PRECISIONS)}")
    if devices != 1 or num_nodes != 1:
        raise UserError(f"--devices {devices} --num_nodes {num_nodes}: only one device on one node is supported")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # Fabric logs there; our lines say as much
    fabric = Fabric(accelerator="auto", devices=devices, num_nodes=num_nodes, precision=precision)
    fabric.launch()
    return fabric


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
