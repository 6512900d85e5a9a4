"""Kernels that keep and move less, against their references: forward and gradients."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_mm.kernels import fused, reference

HEADS = [(1, 1, 2), (5, 3, 8), (7, 1, 6), (0, 2, 4)]
WIDTHS = [(1, 1, 2), (3, 5, 8), (0, 1, 4), (6, 14)]


def both(ours: Callable, theirs: Callable, tensor: Tensor, *arguments: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (ours, theirs) of the output and of the gradient of the first argument."""
    results = []
    for function in (ours, theirs):
        leaf = tensor.clone().requires_grad_()
        output = function(leaf, *arguments)
        output.backward(torch.linspace(-2, 2, output.numel()).view(output.shape).to(output.dtype))
        results.append((output.detach(), leaf.grad))
    return list(zip(*results))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_rotate(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(shape, generator=generator).to(dtype)
    angles = 6 * torch.rand(shape[0], 1, shape[2] // 2, generator=generator)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    ours, theirs = (lambda heads, cos, sin, f=f: f(heads, cos=cos, sin=sin) for f in (fused.rotate, reference.rotate))
    for found, expected in both(ours, theirs, heads, cos, sin):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    strided = torch.randn(shape[0], shape[1], 2, shape[2], generator=generator).to(dtype).unbind(2)[1]  # as values are
    for found, expected in both(ours, theirs, strided, cos, sin):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("shape", WIDTHS, ids=str)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    gate_and_up = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    for found, expected in both(fused.swiglu, reference.swiglu, gate_and_up):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("shape", [*WIDTHS, (300, 1, 70)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    hidden = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    weights = [torch.linspace(0.5, 2, shape[-1]).to(dtype).requires_grad_() for _ in range(2)]
    ours = partial(fused.rms_norm, weight=weights[0], epsilon=1e-5)
    theirs = partial(reference.rms_norm, weight=weights[1], epsilon=1e-5)
    for found, expected in both(ours, theirs, hidden):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    scale = 1 + weights[1].grad.abs().max()  # sums of up to 300 terms
    torch.testing.assert_close(weights[0].grad / scale, weights[1].grad / scale, rtol=tolerance, atol=tolerance)


def test_swiglu_keeps_only_its_input() -> None:
    kept: list[Tensor] = []
    tensor = torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        fused.swiglu(tensor)
    assert [saved.data_ptr() for saved in kept] == [tensor.data_ptr()]
