"""Which form of the kernels runs, and what every operator is made with.

A kernel has up to three forms: `reference` is its definition with torch's own gradient, `fused` is torch that keeps and
moves less, `native` is CUDA. A kernel that has no fused form of its own runs its definition in the type of its tensors.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

Form = Literal["reference", "fused", "native"]
Draw = Callable[..., Tensor]
"""(*shape) to random numbers of the type and on the device that an example is for."""
Example = tuple[Callable[..., "Tensor | tuple[Tensor, ...]"], list[Tensor]]
"""A call of a kernel, and the tensors that it takes and has gradients for."""

_form: Form = "fused"


def form() -> Form:
    """Return which form runs."""
    return _form


def use(form: Form) -> None:
    """Let `form` run from now on."""
    global _form
    _form = form


@contextmanager
def running(form: Form) -> Iterator[None]:
    """Run `form` inside, on any device: 'native' is right for fake tensors, which run nothing."""
    before = _form
    use(form)
    try:
        yield
    finally:
        use(before)


def defined(definition: Callable[..., Any], *tensors: Tensor, **settings: Any) -> Any:
    """Return what a definition gives, computed in FP32 at least and rounded once to the type of the first tensor; its
    gradients likewise."""

    def widened(value: Any) -> Any:
        return wide(value) if isinstance(value, Tensor) else value

    dtype = tensors[0].dtype
    found = definition(*map(widened, tensors), **{name: widened(value) for name, value in settings.items()})
    return tuple(part.to(dtype) for part in found) if isinstance(found, tuple) else found.to(dtype)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in FP32 if it is BF16, as it is otherwise."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def accumulated(like: Tensor) -> torch.dtype:
    """Return the type in which sums of such elements are held."""
    return torch.float32 if like.dtype == torch.bfloat16 else like.dtype


def packed(like: Tensor) -> Tensor:
    """Return a new contiguous tensor of that shape: what a native kernel writes, for its fake."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def operator(
    name: str, *, in_torch: Callable[..., Any] | None = None, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Make a CUDA form the torch operator `megatron_mm::name`, for torch.compile and FakeTensor.

    Where the native form is not the one that runs, the operator calls `in_torch`, if that is given.
    """

    def make(native: Callable[..., Any]) -> torch.library.CustomOpDef:
        @functools.wraps(native)
        def run(*arguments: Any) -> Any:
            return (native if in_torch is None or _form == "native" else in_torch)(*arguments)

        return torch.library.custom_op(f"megatron_mm::{name}", run, mutates_args=mutates)

    return make
