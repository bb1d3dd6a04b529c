"""How likely a model finds tokens: of many samples at a time, laid end to end."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.data import pack
from lit_llama.model import LOSS_CHUNK, LLaMA

Sample = tuple[Sequence[int], int]
"""Token ids, and how many of them, from the front, are only context (at least one): those that follow are scored."""


@torch.inference_mode()
def log_likelihoods(model: LLaMA, samples: Sequence[Sample], batch_tokens: int) -> list[tuple[float, bool]]:
    """For each sample the log-likelihood of its scored tokens, in nats, and whether each is the model's first choice.

    `batch_tokens` at a time are computed (a longer sample alone), logits of scored tokens only. Samples that differ in
    their last token alone, such as answers A, B, C and D to a question, are computed once.
    """
    device = model.embed_tokens.weight.device
    inputs: dict[tuple[int, ...], list[int]] = {}  # the last token is predicted, but predicts nothing
    for number, (ids, first) in enumerate(samples):
        if len(ids) > first:
            inputs.setdefault(tuple(ids[:-1]), []).append(number)
    rows = list(inputs)
    results: list[tuple[float, bool]] = [(0.0, True)] * len(samples)
    with tqdm(total=len(samples), desc="scoring", unit="samples", disable=None) as bar:
        for batch in pack(range(len(rows)), [len(row) for row in rows], batch_tokens):
            input_ids = torch.tensor([token for row in batch for token in rows[row]])
            scored, positions, labels, end = [], [], [], 0
            for row in batch:
                end += len(rows[row])
                for number in inputs[rows[row]]:
                    ids, first = samples[number]
                    scored.append(number)
                    positions.append(torch.arange(end - len(ids) + first, end))
                    labels.append(torch.tensor(ids[first:], dtype=torch.long))
            where = torch.cat(positions).to(device)
            logits = model(input_ids.to(device), [len(rows[row]) for row in batch], where)
            found = token_scores(logits, torch.cat(labels).to(device)).cpu().split([len(ids) for ids in labels])
            for number, (likelihoods, first_choices) in zip(scored, (part.unbind(1) for part in found), strict=True):
                results[number] = float(likelihoods.sum()), bool(first_choices.all())
            bar.update(len(scored))
    return results


def token_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """(labels, vocab), (labels,) -> (labels, 2), float64: log-likelihood, and 1 where the label is the first choice."""
    parts = []
    for rows, ids in zip(logits.split(LOSS_CHUNK), labels.split(LOSS_CHUNK), strict=True):
        rows = rows.float()
        likelihoods = rows.gather(1, ids[:, None])[:, 0] - rows.logsumexp(-1)
        parts.append(torch.stack((likelihoods, rows.argmax(-1) == ids), dim=1))
    return torch.cat(parts).double()
