"""Counts what a piece of code communicates: a dispatch mode that sees every collective, real or fake."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

RING = {
    "_allgather_base_": ("all-gather", lambda arguments: arguments[0], 1),
    "_reduce_scatter_base_": ("reduce-scatter", lambda arguments: arguments[1], 1),
    "allreduce_": ("all-reduce", lambda arguments: arguments[0][0], 2),
}
"""c10d operator -> (its name, the whole tensor among its arguments, how often a ring passes it on)."""


@dataclass
class Collectives(TorchDispatchMode):
    """While it is active, adds up the bytes that one rank sends in ring collectives over groups of `group_size`."""

    group_size: int
    ring_bytes: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "c10d":
            name, whole, passes = RING[function._schema.name.removeprefix("c10d::")]
            tensor: Tensor = whole(args)
            self.calls[name] = self.calls.get(name, 0) + 1
            size = tensor.numel() * tensor.element_size()
            self.ring_bytes += passes * size * (self.group_size - 1) / self.group_size
        return function(*args, **kwargs or {})


def count(group_size: int, forward: Any) -> tuple[float, float]:
    """Return the ring bytes of forward() and of the backward pass of what it returns."""
    with Collectives(group_size) as ahead:
        output = forward()
    with Collectives(group_size) as back:
        output.backward(torch.ones_like(output))
    return ahead.ring_bytes, back.ring_bytes
