"""Prepared sets: token ids on disk, and from there padding-free micro-batches in a seeded order."""

import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lit_llama.checksums import find_damage
from lit_llama.config import LLaMAConfig, read_json
from lit_llama.errors import UserError
from lit_llama.files import read_tensors
from lit_llama.tokenizer import Tokenizer


class PreparedSet:
    """The samples of one `train.safetensors` or `val.safetensors`. Raises UserError where that is not what it is.

    `tokens` (all tokens,) int32 is memory-mapped; `lengths` and `label_counts` are tokens, and tokens with a label, in
    each sample.
    """

    def __init__(self, file: Path) -> None:
        tensors, _ = read_tensors(file)
        if tensors.keys() != {"tokens", "offsets", "prompt_lengths"}:
            raise UserError(f"{file}: not a prepared set. Make one with scripts/prepare_*.py")
        self.tokens, offsets = tensors["tokens"], tensors["offsets"]
        self._starts, self.lengths = offsets.tolist(), offsets.diff().tolist()
        # the first token of a sample is never predicted
        self._first_labels = tensors["prompt_lengths"].clamp(min=1).tolist()
        self.label_counts = [n - first for n, first in zip(self.lengths, self._first_labels, strict=True)]

    def __len__(self) -> int:
        return len(self.lengths)

    def micro_batch(self, sample_ids: list[int], device: torch.device) -> dict[str, Any]:
        """The samples laid end to end, as arguments for `LLaMA.forward`, which then returns their summed loss.

        `input_ids` (tokens,) int64; `lengths` of the samples; `positions` (labels,) of the tokens whose successor is
        learned, `labels` (labels,) those successors. No samples make one token with nothing to learn.
        """
        if not sample_ids:
            nothing = torch.zeros(0, dtype=torch.long, device=device)
            return dict(input_ids=nothing.new_zeros(1), positions=nothing, labels=nothing, lengths=[1])
        inputs, labels, positions, start = [], [], [], 0
        for index in sample_ids:
            ids, first = self.tokens[self._starts[index] : self._starts[index + 1]], self._first_labels[index]
            inputs.append(ids[:-1])  # nothing is predicted after the last token
            labels.append(ids[first:])
            positions.append(torch.arange(start + first - 1, start + len(ids) - 1))
            start += len(ids) - 1
        parts = dict(input_ids=inputs, positions=positions, labels=labels)
        tensors = {name: torch.cat(part).long().to(device, non_blocking=True) for name, part in parts.items()}
        return tensors | {"lengths": [len(ids) for ids in inputs]}


def open_prepared(data_dir: Path, tokenizer: Tokenizer, config: LLaMAConfig) -> tuple[PreparedSet, PreparedSet, dict]:
    """Training set, validation set and meta.json of a prepared folder.

    All three are of one preparing, whoever prepares the folder anew meanwhile. Raises UserError where it is missing,
    damaged, or made with another tokenizer or for a longer context.
    """
    for _ in range(100):
        before, problem = _identity(data_dir), None
        try:
            found = _open_prepared(data_dir, tokenizer, config)
        except (UserError, OSError) as error:
            problem = error
        if _identity(data_dir) == before:
            if problem is None:
                return found
            raise problem
        time.sleep(0.02)
    raise problem or UserError(f"{data_dir}: is prepared anew all the time. Try again when that has ended")


def _identity(folder: Path) -> tuple[int, int] | None:
    """Other than that of every folder that was there before, or will be later."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _open_prepared(data_dir: Path, tokenizer: Tokenizer, config: LLaMAConfig) -> tuple[PreparedSet, PreparedSet, dict]:
    if not (data_dir / "meta.json").is_file():
        hint = f"python scripts/prepare_alpaca.py --data_dir {data_dir}"
        raise UserError(f"{data_dir}: no prepared set there. Make one: {hint}")
    if damage := find_damage(data_dir):
        raise UserError(f"{data_dir}/{damage}. Prepare it again")
    meta = read_json(data_dir / "meta.json")
    if meta.get("tokenizer_sha256") != tokenizer.sha256:
        hint = "Prepare it again with this --checkpoint_dir"
        raise UserError(f"{data_dir}: was prepared with another tokenizer than {tokenizer.path}. {hint}")
    train, val = PreparedSet(data_dir / "train.safetensors"), PreparedSet(data_dir / "val.safetensors")
    for samples in (train, val):
        if len(samples) and not 0 <= int(samples.tokens.min()) <= int(samples.tokens.max()) < config.vocab_size:
            raise UserError(f"{data_dir}: holds token ids outside the model's {config.vocab_size}. Prepare it again")
    longest, context = max(train.lengths + val.lengths), config.max_position_embeddings
    if longest > context:
        hint = f"Prepare it again with --max_seq_length {context}"
        raise UserError(f"{data_dir}: has a sample of {longest} tokens, the model's context holds {context}. {hint}")
    return train, val, meta


def pack(sample_ids: Iterable[int], lengths: list[int], micro_batch_tokens: int) -> list[list[int]]:
    """Cut samples into micro-batches of at most `micro_batch_tokens` tokens (one longer sample stands alone).

    First-fit decreasing: longest samples first, each into the first micro-batch that has room.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(sample_ids, key=lambda i: (-lengths[i], i)):
        place = next((n for n, free in enumerate(room) if free >= lengths[index]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(micro_batch_tokens)
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def share(batches: list[list[int]], rank: int, world_size: int) -> list[list[int]]:
    """One process's part of a step's micro-batches. All get equally many: empty ones stand in where there are too few,
    since a process that has none left must still take part in what the others' need of its shard of the weights.
    """
    own = batches[rank::world_size]
    return own + [[]] * (-(-len(batches) // world_size) - len(own))


def step_samples(places: range, num_samples: int, seed: int) -> list[int]:
    """Which samples a step sees that goes through these places of a run, counted over all of its epochs.

    Every epoch is a fresh permutation of all, one after the other: a function of the seed alone, so that a resumed run
    needs to know no more than its place.
    """
    return [_epoch_order(place // num_samples, num_samples, seed)[place % num_samples] for place in places]


@lru_cache(maxsize=2)
def _epoch_order(epoch: int, num_samples: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_samples, generator=generator).tolist()
