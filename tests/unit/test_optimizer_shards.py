"""A range of a flattened tensor is cut into rectangular blocks of it."""

from math import prod

import pytest
import torch

from megatron_mm.checkpoint.optimizer_shards import rectangles


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (3, 1, 2, 2)])
def test_the_blocks_of_every_range_are_its_elements_in_order(shape: tuple[int, ...]) -> None:
    numel = prod(shape)
    whole = torch.arange(numel).view(shape)
    for start in range(numel + 1):
        for stop in range(start, numel + 1):
            seen = []
            for offset, size in rectangles(shape, start, stop):
                block = whole[tuple(slice(first, first + count) for first, count in zip(offset, size))]
                assert block.shape == size
                seen += block.flatten().tolist()
            assert seen == list(range(start, stop))


def test_a_share_of_a_matrix_is_three_blocks_at_most() -> None:
    assert list(rectangles((4, 5), 3, 18)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 3))]
