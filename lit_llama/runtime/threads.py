"""Two threads on a CPU that other processes use too, each with a half of the micro-batch.

A layer consists of many small operations. If all cores share each of them, they wait for each other
hundreds of times per layer, and for whatever else runs on one of them. Two halves of the samples,
each with a half of the cores, never wait for each other until both are done.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn


def run_in_threads(
    fabric: Fabric,
    model: nn.Module,
    function: Callable[[list[int]], Tensor],
    sample_ids: list[int],
    lengths: list[int],
) -> list[Tensor]:
    """Call `function` for a micro-batch, or if the model `trains_halves` for two of it at once.

    Returns the result of each call. `function` may add to gradients. `lengths` are the tokens of
    each sample of the dataset.
    """
    splits = getattr(model, "trains_halves", False) and fabric.world_size == 1
    if not splits or len(sample_ids) < 2 or torch.get_num_threads() % 2:
        return [function(sample_ids)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The threads add to a gradient in any order. This changes nothing in a sum of two, but in one
    # of three: the two, and what was there before.
    before = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    results = list(_threads(torch.get_num_threads()).map(function, halves(sample_ids, lengths)))
    for parameter, grad in zip(trained, before, strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)
    return results


def halves(sample_ids: list[int], lengths: list[int]) -> tuple[list[int], list[int]]:
    """Split samples into two lists of about as many tokens."""
    parts: tuple[list[int], list[int]] = [], []
    tokens = [0, 0]
    for index in sorted(sample_ids, key=lambda i: (-lengths[i], i)):
        smaller = tokens.index(min(tokens))
        parts[smaller].append(index)
        tokens[smaller] += lengths[index]
    return parts


@cache
def _threads(cores: int) -> ThreadPoolExecutor:
    """Start the two threads."""

    def set_up() -> None:
        torch.set_num_threads(cores // 2)
        torch.set_autocast_cache_enabled(False)  # as `setup_fabric` does for the main thread

    threads, both = ThreadPoolExecutor(2, "half of a micro-batch", set_up), Barrier(2)
    list(threads.map(lambda _: both.wait(), range(2)))
    torch.set_num_threads(cores)  # of threads that start later
    return threads
