"""What the forms of a kernel are compared with: its definition in FP64, forward and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
"""Of the error, as a part of the element plus the tensor's root mean square: FP32 sums in some order; for BF16 the half
unit (2^-9) of a rounded result and of a rounded intermediate."""
IN_TORCH = {"reference": {**BOUND, torch.bfloat16: 2.0**-7}, "fused": {**BOUND, torch.bfloat16: 2.0**-5}}
"""The same where torch adds the gradients that meet in a tensor, which rounds once more, and of the fused form, which
rounds BF16 after each operation: up to eight, and as many as an id has rows in the gradient of an embedding."""

Case = Callable[[Callable[[Tensor], Tensor]], list[Tensor]]
"""Takes what moves a tensor to where the form runs, and returns all outputs and gradients."""

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def draw(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def with_gradients(function: Callable, leaves: list[Tensor], settings: dict[str, Any]) -> list[Tensor]:
    """Return the outputs of a call, and the gradients of its leaves for fixed gradients of the outputs."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]  # not cloned: strides stay
    outputs = function(*leaves, **settings)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # Drawn in BF16, which every type holds, so that all forms are given the same.
    weights = [draw(torch.bfloat16, *out.shape, seed=place).to(out) for place, out in enumerate(outputs, start=3)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, weights)]


def beside(
    definition: Callable, function: Callable, leaves: list[Tensor], **settings: Any
) -> tuple[Case, list[Tensor], list[torch.dtype]]:
    """Return the arguments of the fixture `check` for a function that means what `definition` says."""

    def over(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {name: change(value) if isinstance(value, Tensor) else value for name, value in settings.items()}

    def exact(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    expected = with_gradients(definition, [leaf.double() for leaf in leaves], over(exact))

    def case(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return with_gradients(function, [place(leaf) for leaf in leaves], over(place))

    return case, expected, [leaves[0].dtype] * len(expected)


def assert_near(found: list[Tensor], expected: list[Tensor], dtypes: list[torch.dtype], bound: dict = BOUND) -> None:
    assert len(found) == len(expected) == len(dtypes)
    for ours, theirs, dtype in zip(found, expected, dtypes):
        assert ours.shape == theirs.shape
        assert ours.dtype == dtype
        if theirs.numel():
            scale = theirs.abs() + theirs.square().mean().sqrt()
            worst = ((ours.double() - theirs).abs() / scale.clamp(min=1e-30)).nan_to_num(torch.inf).max().item()
            assert worst <= bound[dtype], worst
