"""Prepared sets: token ids on disk, and from there padding-free micro-batches in a seeded order."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.checkpoint import open_safetensors
from lit_llama.config import LLaMAConfig, read_json
from lit_llama.errors import UserError
from lit_llama.tokenizer import Tokenizer


def check_vocabulary(tokenizer: Tokenizer, config: LLaMAConfig) -> None:
    """Raise UserError where the tokenizer knows ids that the embedding has no row for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} tokens, the model's embedding only {config.vocab_size} "
            "(vocab_size in config.json). Use the tokenizer that came with the model"
        )


class PreparedSet:
    """The samples of one `train.safetensors` or `val.safetensors`, memory-mapped.

    Attributes:
        tokens: (all tokens,) int32.
        lengths: tokens in each sample.
        label_counts: tokens with a label in each sample.
    """

    def __init__(self, file: Path) -> None:
        """Raises UserError where the file is damaged or is no prepared set."""
        with open_safetensors(file) as handle:
            if set(handle.keys()) != {"tokens", "offsets", "prompt_lengths"}:
                raise UserError(f"{file}: not a prepared set. Make one with scripts/prepare_*.py")
            self.tokens = handle.get_tensor("tokens")
            offsets, prompt_lengths = handle.get_tensor("offsets"), handle.get_tensor("prompt_lengths")
        self._starts = offsets.tolist()
        self._prompt_lengths = prompt_lengths.tolist()
        self.lengths = offsets.diff().tolist()
        # the first token of a sample is never predicted
        pairs = zip(self.lengths, self._prompt_lengths, strict=True)
        self.label_counts = [length - max(prompt, 1) for length, prompt in pairs]

    def __len__(self) -> int:
        return len(self.lengths)

    def micro_batch(self, sample_ids: list[int]) -> "MicroBatch":
        """The samples, laid end to end."""
        inputs, labels, positions, start = [], [], [], 0
        for index in sample_ids:
            ids = self.tokens[self._starts[index] : self._starts[index + 1]]
            first_label = max(self._prompt_lengths[index], 1)
            inputs.append(ids[:-1])  # nothing is predicted after the last token
            labels.append(ids[first_label:])
            positions.append(torch.arange(start + first_label - 1, start + len(ids) - 1))
            start += len(ids) - 1
        return MicroBatch(
            torch.cat(inputs).long(),
            [len(ids) for ids in inputs],
            torch.cat(positions),
            torch.cat(labels).long(),
            sample_ids,
        )


@dataclass
class MicroBatch:
    """Samples laid end to end, without padding.

    `input_ids` (tokens,) int64; `lengths` of the samples; `positions` (labels,) of the tokens whose successor is
    learned, `labels` (labels,) those successors; `sample_ids` where the samples are in their set.
    """

    input_ids: Tensor
    lengths: list[int]
    positions: Tensor
    labels: Tensor
    sample_ids: list[int]

    def to(self, device: torch.device) -> "MicroBatch":
        moved = (t.to(device, non_blocking=True) for t in (self.input_ids, self.positions, self.labels))
        input_ids, positions, labels = moved
        return MicroBatch(input_ids, self.lengths, positions, labels, self.sample_ids)


def open_prepared(data_dir: Path, tokenizer: Tokenizer, vocab_size: int) -> tuple[PreparedSet, PreparedSet, dict]:
    """Training set, validation set and meta.json of a prepared folder, checked against the model.

    Raises:
        UserError: the folder is missing, damaged or was prepared with another tokenizer.
    """
    if not (data_dir / "meta.json").is_file():
        raise UserError(
            f"{data_dir}: no prepared set there. Make one: python scripts/prepare_alpaca.py --data_dir {data_dir}"
        )
    meta = read_json(data_dir / "meta.json")
    if meta.get("tokenizer_sha256") != tokenizer.sha256:
        raise UserError(
            f"{data_dir}: was prepared with another tokenizer than {tokenizer.path}. "
            "Prepare it again with this --checkpoint_dir"
        )
    train, val = PreparedSet(data_dir / "train.safetensors"), PreparedSet(data_dir / "val.safetensors")
    for samples in (train, val):
        if len(samples) and not 0 <= int(samples.tokens.min()) <= int(samples.tokens.max()) < vocab_size:
            raise UserError(
                f"{data_dir}: holds token ids outside the model's vocabulary of {vocab_size}. Prepare it again"
            )
    return train, val, meta


def pack(sample_ids: Iterable[int], lengths: list[int], micro_batch_tokens: int) -> list[list[int]]:
    """Cut samples into micro-batches of at most `micro_batch_tokens` tokens (one longer sample stands alone).

    First-fit decreasing: longest samples first, each into the first micro-batch that has room.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(sample_ids, key=lambda i: (-lengths[i], i)):
        place = next((n for n, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(micro_batch_tokens)
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


class SampleOrder:
    """Which samples each step sees: every epoch a fresh permutation of all, one after the other, cut into steps.

    A function of the seed and the step's number alone: a resumed run needs no state to go on.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self._epoch, self._order = -1, []  # the permutation made last

    def step(self, number: int, total: int) -> list[int]:
        """Sample ids of step `number` (from 0) of a run over `total` samples in all."""
        start = number * self.batch_size
        return [self._sample(place) for place in range(start, min(start + self.batch_size, total))]

    def _sample(self, place: int) -> int:
        epoch, index = divmod(place, self.num_samples)
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.num_samples, generator=generator).tolist()
        return self._order[index]
