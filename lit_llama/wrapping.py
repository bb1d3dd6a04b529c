"""How a finetuning method wraps modules of a LLaMA and finds their checkpoint names again."""

# A module that wraps another one holds it as `base`. Removing `.base` from the name of a module or
# parameter gives its name in the checkpoint.

import re

import torch
from torch import Tensor, nn

from lit_llama.model import LLaMA


def base_name(name: str) -> str:
    """Return the checkpoint name of a module or parameter: strip the wrappers' `.base`."""
    return re.sub(r"\.base(?=\.|$)", "", name)


def base_parameters(model: LLaMA) -> dict[str, tuple[nn.Module, str]]:
    """Map the LLaMA's own checkpoint names to the module and attribute that hold the parameter."""
    with torch.device("meta"):
        names = {name for name, _ in LLaMA(model.config).named_parameters()}
    found = {}
    for prefix, module in model.named_modules():
        for attribute, _ in module.named_parameters(recurse=False):
            name = base_name(f"{prefix}.{attribute}")
            if name in names:
                found[name] = (module, attribute)
    return found


def base_linears(model: LLaMA) -> dict[str, nn.Linear]:
    """Return the linear layers of the LLaMA itself, by their current names."""
    own = {id(module) for module, _ in base_parameters(model).values()}
    linears = [pair for pair in model.named_modules() if isinstance(pair[1], nn.Linear)]
    return {name: linear for name, linear in linears if id(linear) in own}


def init_device(weight: Tensor) -> torch.device:
    """Device for a layer's new parameters: the weight's, or the CPU if that is on meta."""
    # New parameters start from random numbers, which the meta device cannot hold.
    return torch.device("cpu") if weight.is_meta else weight.device


def unfreeze(model: LLaMA, precision: str) -> None:
    """Train all weights: in fp32 for precision "bf16-mixed", else in their own dtype."""
    model.requires_grad_(True)
    # Updates of a small learning rate would be lost in the 8 bits of a bf16 weight. With mixed
    # precision, autocast makes bf16 copies of these fp32 weights to compute with.
    if precision == "bf16-mixed":
        model.float()
