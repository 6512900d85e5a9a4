"""Initial weights: each value a function of seed, name and global index, however the tensor is cut."""

import numpy as np
import pytest
import torch

from megatron_mm.model import initialize
from megatron_mm.model.initialize import draw_normal, normal_of


def reference(indices: np.ndarray, key: int) -> np.ndarray:
    """The same values from the published definitions, in numpy's unsigned integers."""
    with np.errstate(over="ignore"):
        z = (indices.astype(np.uint64) + np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    first = ((z >> np.uint64(32)).astype(np.float64) + 0.5) / 2**32
    second = (z & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2**32
    return np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_values_follow_the_definitions(key: int) -> None:
    indices = np.asarray([0, 1, 2, 1000, 2**31, 2**40, 2**45 + 7])
    np.testing.assert_allclose(
        normal_of(torch.from_numpy(indices), key=key).numpy(), reference(indices, key), rtol=1e-12
    )


def test_values_are_standard_normal_and_independent() -> None:
    values = normal_of(torch.arange(1_000_000), key=42)
    assert abs(values.mean()) < 0.005
    assert abs(values.std() - 1) < 0.005
    assert abs((values**4).mean() - 3) < 0.05
    assert abs((values[1:] * values[:-1]).mean()) < 0.005
    assert abs((values * normal_of(torch.arange(1_000_000), key=43)).mean()) < 0.005
    assert values.isfinite().all()


def whole_and_shards(
    shape: tuple[int, ...], *, dim: int, stride: int, tp_size: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    whole = torch.empty(shape)
    draw_normal(whole, std=0.5, key=7, tp_rank=0, tp_size=1)
    shards = []
    for rank in range(tp_size):
        local = list(shape)
        local[dim] //= tp_size
        shard = torch.empty(local)
        shard.partition_dim, shard.partition_stride = dim, stride
        draw_normal(shard, std=0.5, key=7, tp_rank=rank, tp_size=tp_size)
        shards.append(shard)
    return whole, shards


@pytest.mark.parametrize("tp_size", [2, 4])
def test_shards_of_rows_and_columns_are_parts_of_the_whole(tp_size: int) -> None:
    for dim in (0, 1):
        whole, shards = whole_and_shards((24, 16), dim=dim, stride=1, tp_size=tp_size)
        assert torch.equal(torch.cat(shards, dim), whole)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_shards_of_gate_and_up_are_parts_of_each(tp_size: int) -> None:
    whole, shards = whole_and_shards((32, 6), dim=0, stride=2, tp_size=tp_size)
    gates, ups = zip(*(shard.chunk(2) for shard in shards))
    assert torch.equal(torch.cat([*gates, *ups]), whole)


def test_large_tensors_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.empty(37, 11)
    draw_normal(whole, std=1.0, key=3, tp_rank=0, tp_size=1)
    monkeypatch.setattr(initialize, "ELEMENTS_AT_ONCE", 25)
    pieces = torch.empty(37, 11)
    draw_normal(pieces, std=1.0, key=3, tp_rank=0, tp_size=1)
    assert torch.equal(pieces, whole)


def test_every_shape_is_filled() -> None:
    for shape in ((7,), (3, 4), (2, 3, 5), (4, 3, 2, 2)):
        tensor = torch.full(shape, torch.nan)
        draw_normal(tensor, std=1.0, key=1, tp_rank=0, tp_size=1)
        expected = normal_of(torch.arange(tensor.numel()), key=1).float()
        assert torch.equal(tensor.flatten(), expected)
