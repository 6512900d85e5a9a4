"""The norm, alone and of a sum, in all its forms beside its definition."""

from collections.abc import Callable

import pytest
import torch
from agreement import beside, draw, dtypes

from megatron_mm.kernels.forms import running
from megatron_mm.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_native,
    rms_norm_reference,
)

EPSILON = 1e-5


@dtypes
@pytest.mark.parametrize("adds", [True, False], ids=["add", "alone"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 5), (2, 1056), (0, 8), (7, 16), (30, 1, 70)], ids=str)
def test_rms_norm(check: Callable, dtype: torch.dtype, shape: tuple[int, ...], adds: bool) -> None:
    # Of one column the gradient is what epsilon leaves of a difference of equal terms: a small one leaves rounding.
    epsilon = 0.5 if shape[-1] == 1 else EPSILON
    weight = draw(dtype, shape[-1])
    if adds:
        # Multiples of 1/16 below 8: every form rounds their sum, which BF16 holds, to the same.
        hidden, residual = ((draw(dtype, *shape, seed=seed) * 16).round().clamp(-127, 127) / 16 for seed in (0, 1))
        leaves = [hidden, residual, weight]
        ours, theirs = (
            lambda hidden, residual, weight, add=add: add(hidden, residual=residual, weight=weight, epsilon=epsilon)
            for add in (add_rms_norm, add_rms_norm_reference)
        )
    else:
        leaves = [draw(dtype, *shape), weight]
        ours, theirs = (
            lambda hidden, weight, norm=norm: norm(hidden, weight=weight, epsilon=epsilon)
            for norm in (rms_norm, rms_norm_reference)
        )
    check(*beside(theirs, ours, leaves))


def test_the_definition_is_computed_wide_and_rounded_once() -> None:
    hidden, weight = (draw(torch.bfloat16, *shape).requires_grad_() for shape in ((5, 64), (64,)))
    with running("reference"):
        found = rms_norm(hidden, weight=weight, epsilon=EPSILON)
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    expected = rms_norm_reference(wide[0], weight=wide[1], epsilon=EPSILON)
    found.sum().backward()
    expected.sum().backward()
    assert torch.equal(found, expected.bfloat16())
    assert torch.equal(hidden.grad, wide[0].grad.bfloat16()) and torch.equal(weight.grad, wide[1].grad.bfloat16())


@pytest.mark.usefixtures("on_host")
def test_a_row_too_wide_is_refused() -> None:
    wide = torch.zeros(1, 8193)
    with pytest.raises(ValueError, match="wider than the kernel holds"):
        rms_norm_native(wide, None, wide[0], EPSILON)
