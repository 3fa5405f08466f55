"""The zigzag partition: which tokens a rank holds, and the ways there and back."""

import pytest
import torch

from megatsp.tsp.partition import local_positions, take_local, to_global, to_shards

CPU = torch.device("cpu")
SIZES = [1, 2, 3, 4]


def test_two_ranks_hold_the_ends_and_the_middle():
    assert local_positions(8, 0, 2, CPU).tolist() == [0, 1, 6, 7]
    assert local_positions(8, 1, 2, CPU).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("size", SIZES)
def test_every_token_once_and_equal_causal_work(size):
    held = [local_positions(6 * size, rank, size, CPU) for rank in range(size)]
    assert torch.cat(held).sort().values.tolist() == list(range(6 * size))
    assert len({(positions + 1).sum().item() for positions in held}) == 1  # token i sees i + 1


@pytest.mark.parametrize("size", SIZES)
def test_shards_make_the_sequence_and_come_apart_again(size):
    whole = torch.arange(2 * 10 * size * 3).view(2, 10 * size, 3)
    shards = torch.stack([take_local(whole, rank, size, dim=1) for rank in range(size)])
    assert torch.equal(to_global(shards), whole)
    assert torch.equal(to_shards(whole, size), shards)


def test_along_another_dim():
    whole = torch.arange(24).view(2, 3, 4)
    assert torch.equal(take_local(whole, 1, 2, dim=2), whole[:, :, 1:3])
    assert torch.equal(take_local(whole, 0, 2, dim=-1), whole[:, :, [0, 3]])


def test_a_length_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="a sequence of 12 tokens does not split into 2 x 4 chunks"):
        take_local(torch.zeros(1, 12), 0, 4)
