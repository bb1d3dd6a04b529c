"""Tokenized datasets, packed (padding-free) micro-batches, and the seeded order of samples."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


class TokenizedDataset:
    """Samples of token ids; `lengths` and `label_counts` are the tokens and labels of each."""

    # `tensors` holds `tokens` (all tokens,) int32, `is_label` (all tokens,) bool, those to learn,
    # and for each sample: `offsets` (samples + 1,) in them and `label_counts` (samples,).
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tokens, self.is_label = tensors["tokens"], tensors["is_label"]
        self.lengths = tensors["offsets"].diff().tolist()
        self.label_counts = tensors["label_counts"].tolist()
        self._offsets = tensors["offsets"].tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the token ids of a sample and which of them are labels, each (tokens,)."""
        part = slice(self._offsets[index], self._offsets[index + 1])
        return self.tokens[part], self.is_label[part]

    def micro_batch(self, sample_ids: list[int], device: torch.device) -> dict[str, Any]:
        """Pack samples into arguments of `LLaMA.forward`, which then returns their summed loss.

        `input_ids` (tokens,), `lengths` of its samples, `labels` (labels,) and `label_positions`
        (labels,), the tokens that predict them. Without samples: one token and no label.
        """
        if not sample_ids:
            token = torch.zeros(1, dtype=torch.long, device=device)
            return dict(input_ids=token, lengths=[1], label_positions=token[:0], labels=token[:0])
        inputs, labels, positions, start = [], [], [], 0
        for index in sample_ids:
            ids, is_label = self.sample(index)
            # the last token predicts nothing, so the model does not need to see it
            inputs.append(ids[:-1])
            labels.append(ids[is_label])
            # each label is predicted at the token before it
            positions.append(start + is_label.nonzero()[:, 0] - 1)
            start += len(ids) - 1
        packed = dict(input_ids=inputs, label_positions=positions, labels=labels)
        # int32 on disk halves the file; torch's embedding and loss take int64
        packed = {name: torch.cat(parts).long() for name, parts in packed.items()}
        batch = {name: part.to(device, non_blocking=True) for name, part in packed.items()}
        return batch | {"lengths": [len(ids) for ids in inputs]}


def pack_micro_batches(
    sample_ids: Iterable[int], lengths: list[int], micro_batch_tokens: int
) -> list[list[int]]:
    """Split samples into micro-batches of at most `micro_batch_tokens` tokens, or one sample."""
    # first-fit decreasing: within 11/9 of the fewest possible micro-batches (Johnson 1973)
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(sample_ids, key=lambda i: (-lengths[i], i)):
        chosen = next((n for n, free in enumerate(room) if free >= lengths[index]), len(room))
        if chosen == len(room):
            batches.append([])
            room.append(micro_batch_tokens)
        batches[chosen].append(index)
        room[chosen] -= lengths[index]
    return batches


def split_across_ranks(batches: list[list[int]], rank: int, world_size: int) -> list[list[int]]:
    """Return this rank's micro-batches, padded with empty ones to the same number on all ranks."""
    # a rank without data still has to run: its shard of the weights is gathered by the others
    per_rank = -(-len(batches) // world_size)
    own = batches[rank::world_size]
    return own + [[]] * (per_rank - len(own))


def sample_indices(positions: range, num_samples: int, seed: int) -> list[int]:
    """Return the samples at the given global positions of a run; each epoch is reshuffled."""
    # a function of the seed alone: a resumed run needs to know only its position
    places = [divmod(position, num_samples) for position in positions]
    return [_epoch_order(epoch, num_samples, seed)[index] for epoch, index in places]


@lru_cache(maxsize=2)  # a step may cross from one epoch into the next
def _epoch_order(epoch: int, num_samples: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_samples, generator=generator).tolist()
