"""Dropout masks that follow the sample and not the samples beside it."""

import torch

from lit_llama.dropout import token_dropout, token_rows

CPU = torch.device("cpu")


def masks(
    sample_ids: list[int], lengths: list[int], seed: int = 0, step: int = 0, name: str = "a"
) -> list[list]:
    """Return the mask of each sample of a micro-batch."""
    with token_rows(seed, step, sample_ids, lengths, CPU):
        dropped = token_dropout(torch.ones(sum(lengths), 64), 0.3, name)
    return [part.tolist() for part in dropped.split(lengths)]


def test_mask_of_a_sample_does_not_depend_on_its_micro_batch() -> None:
    together = masks([7, 3, 5], [10, 20, 30])
    assert together == [masks([7], [10])[0], *masks([3, 5], [20, 30])]
    assert together[::-1] == masks([5, 3, 7], [30, 20, 10])


def test_masks_differ_by_seed_step_sample_layer_and_token() -> None:
    mask = masks([7], [10])
    assert mask != masks([7], [10], seed=1)
    assert mask != masks([7], [10], step=1)
    assert mask != masks([8], [10])
    assert mask != masks([7], [10], name="b")
    assert mask[0][0] != mask[0][1]


def test_rate_and_scale_are_those_of_plain_dropout() -> None:
    values = torch.cat([torch.tensor(mask).flatten() for mask in masks([1, 2], [500, 700])])
    torch.testing.assert_close(values.unique(), torch.tensor([0.0, 1 / 0.7]))
    # 76,800 draws: a standard deviation of 0.0017
    assert abs((values == 0).float().mean() - 0.3) < 0.01


def test_outside_of_a_training_step_it_is_plain_dropout() -> None:
    torch.manual_seed(0)
    actual = token_dropout(torch.ones(4, 64), 0.3, "a")
    torch.manual_seed(0)
    assert torch.equal(actual, torch.nn.functional.dropout(torch.ones(4, 64), 0.3))
