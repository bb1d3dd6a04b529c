"""Batched log-likelihoods of continuations, packed without padding."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.data import TokenizedDataset, pack_micro_batches
from lit_llama.errors import UserError
from lit_llama.model import LLaMA

CHUNK = 256  # labels whose logits, (256, vocab_size) in fp32, are in memory at once

Sample = tuple[Sequence[int], int]
"""Token ids, and how many of the first ones are only context (at least one): the rest is scored."""


def choose_folder(
    checkpoint_dir: Path | None, lora_path: Path | None, adapter_path: Path | None
) -> Path:
    """Return the folder to load among a script's three flags."""
    flags = "--checkpoint_dir, --lora_path, --adapter_path"
    if lora_path and adapter_path:
        hint = "an adapter that was trained beside a LoRA is in its folder"
        raise UserError(f"{flags}: pass only one of the last two ({hint})")
    if not (lora_path or adapter_path or checkpoint_dir):
        raise UserError(f"{flags}: pass one of them")
    return lora_path or adapter_path or checkpoint_dir


def dataset_samples(dataset: TokenizedDataset) -> Iterator[Sample]:
    """Yield a sample for each span of labels, which ends with it."""
    for index in range(len(dataset)):
        ids, is_label = dataset.sample(index)
        flags = is_label.int()
        edges = flags.diff(prepend=flags.new_zeros(1), append=flags.new_zeros(1)).nonzero()[:, 0]
        for start, end in edges.view(-1, 2).tolist():
            yield ids[:end].tolist(), start


@torch.inference_mode()
def log_likelihoods(
    model: LLaMA, samples: Sequence[Sample], batch_tokens: int
) -> list[tuple[float, bool]]:
    """Return each sample's log-likelihood in nats, and whether greedy decoding would give it.

    A batch has at most `batch_tokens` tokens (a longer sample is a batch of its own). Samples that
    differ in their last token only, such as answers A, B, C and D, are computed once.
    """
    device = model.embed_tokens.weight.device
    inputs: dict[tuple[int, ...], list[int]] = {}  # without the last token, which predicts nothing
    for number, (ids, first) in enumerate(samples):
        if len(ids) > first:
            inputs.setdefault(tuple(ids[:-1]), []).append(number)
    rows = list(inputs)
    lengths = [len(row) for row in rows]
    results: list[tuple[float, bool]] = [(0.0, True)] * len(samples)
    with tqdm(total=len(samples), desc="scoring", unit="samples", disable=None) as bar:
        for batch in pack_micro_batches(range(len(rows)), lengths, batch_tokens):
            input_ids = torch.tensor([token for row in batch for token in rows[row]])
            scored, positions, labels, end = [], [], [], 0
            for row in batch:
                end += len(rows[row])
                for number in inputs[rows[row]]:
                    ids, first = samples[number]
                    scored.append(number)
                    positions.append(torch.arange(end - len(ids) + first, end))
                    labels.append(torch.tensor(ids[first:], dtype=torch.long))
            if (token := int(input_ids.max())) >= model.config.vocab_size:
                problem = f"a sample has token id {token}, the model's embedding only"
                hint = "Use the model's own tokenizer, or save its new rows"
                raise UserError(f"{problem} {model.config.vocab_size} rows. {hint}")
            logits = model(
                input_ids.to(device),
                [lengths[row] for row in batch],
                label_positions=torch.cat(positions).to(device),
            )
            scores = token_scores(logits, torch.cat(labels).to(device)).cpu()
            parts = scores.split([len(ids) for ids in labels])
            for number, part in zip(scored, parts, strict=True):
                likelihoods, first_choices = part.unbind(1)
                results[number] = float(likelihoods.sum()), bool(first_choices.all())
            bar.update(len(scored))
    return results


def token_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Score labels (labels,) by logits (labels, vocab): (labels, 2), float64.

    The columns are the log-likelihood, and 1 if the label is the most likely token.
    """
    parts = []
    for rows, ids in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True):
        rows = rows.float()
        likelihoods = rows.gather(1, ids[:, None])[:, 0] - rows.logsumexp(-1)
        parts.append(torch.stack((likelihoods, rows.argmax(-1) == ids), dim=1))
    return torch.cat(parts).double()
