"""The optimizer state as each data-parallel rank holds it, described as blocks of whole tensors.

megatron-core 0.19.2 either keeps the layout of its own buckets, which no other layout can load, or gathers the state of
all data-parallel ranks on each of them ("fully_reshardable") while training stands still. A rank's share of a parameter
is a range of its flattened elements: a few rectangular blocks, which can be written as they lie in memory and are read
back as parts of the same whole tensors.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

LOADED_AS = "fully_reshardable"
"""megatron-core's name for whole tensors that any layout can cut: how it, and earlier versions, load them."""


def describe_shards(optimizer: ChainedOptimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """Return what `optimizer` adds to a checkpoint, of each optimizer that it chains: views of its tensors, no copies.

    `model_state` is the sharded state of the model that it updates. No communication.
    """
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    described = {id(part.data): part for part in nested_values(tensors)}
    parts = [_describe(part, described) for part in optimizer.chained_optimizers]
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def _describe(optimizer: DistributedOptimizer, described: dict[int, ShardedTensor]) -> dict[str, Any]:
    """Return what one distributed optimizer adds; `described` are the model's tensors by their id."""
    shards = []
    for parameter, name, value, first in states_of(optimizer):
        shards += _blocks_of(described[id(parameter)], name, value, first=first)
    return {
        **optimizer.state_dict(),
        "param_state": dict(enumerate(shards)),
        "param_state_sharding_type": LOADED_AS,
    }


def states_of(optimizer: DistributedOptimizer) -> Iterator[tuple[Tensor, str, Tensor, int]]:
    """Yield what this rank has of each parameter: the parameter, the state's name, its values and the first's place.

    Values (numel,) are those of the flattened parameter from that place on, the FP32 weights among them.
    """
    optimizer.init_state_fn(optimizer.optimizer)  # what no step has changed yet is zero, and has to be there
    for buckets in optimizer.gbuf_ranges:
        for bucket in (one for of_type in buckets.values() for one in of_type):
            for parameter, ranges in bucket["param_map"].items():
                for name, value in optimizer._get_main_param_and_optimizer_states(parameter).items():
                    assert value.dtype == torch.float32
                    yield parameter, name, value, ranges["param"].start


def _blocks_of(
    described: ShardedTensor | ShardedTensorFactory, name: str, values: Tensor, *, first: int
) -> Iterator[ShardedTensor]:
    """Describe `values` (numel,), elements of a flattened parameter from `first` on, as blocks of its whole tensor."""
    key = f"optimizer.state.{name}.{described.key}"
    whole = torch.empty(described.data.shape, dtype=values.dtype, device="meta")  # tells where its parts begin
    if isinstance(described, ShardedTensorFactory):
        parts = list(nested_values(replace(described, key=key, data=whole).build()))
    else:
        parts = [replace(described, key=key, data=whole, dtype=values.dtype)]
    for part in parts:
        assert part.data.is_contiguous()
        begin = part.data.storage_offset()
        start, stop = max(first, begin), min(first + values.numel(), begin + part.data.numel())
        outer = part.global_offset[: part.prepend_axis_num]
        inner = part.global_offset[part.prepend_axis_num :]
        for offset, size in rectangles(tuple(part.local_shape), start - begin, stop - begin):
            block = values[start - first : start - first + prod(size)]
            start += prod(size)
            yield replace(
                part,
                data=block.view((1,) * len(outer) + size),
                local_shape=(1,) * len(outer) + size,
                global_offset=(*outer, *(one + other for one, other in zip(inner, offset))),
                axis_fragmentations=None,
                replica_id=(*part.replica_id[:2], 0),  # of the data-parallel ranks only this one has it
                prepend_axis_num=0,
            )


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut elements `start` to `stop` of a flattened tensor into blocks, in order: (offset, size) of each."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = prod(shape[1:])
    while start < stop:
        index, within = divmod(start, row)
        if within == 0 and stop - start >= row:
            rows = (stop - start) // row
            yield (index,) + (0,) * (len(shape) - 1), (rows, *shape[1:])
            start += rows * row
            continue
        end = min(stop, (index + 1) * row)
        for offset, size in rectangles(shape[1:], within, end - index * row):
            yield (index, *offset), (1, *size)
        start = end
