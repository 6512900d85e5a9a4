"""Root mean square norm (Zhang and Sennrich 2019), alone and of a sum that it computes as it reads it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_mm.kernels import native
from megatron_mm.kernels.forms import Draw, Example, accumulated, defined, form, operator, packed


def rms_norm(hidden: Tensor, *, weight: Tensor, epsilon: float) -> Tensor:
    """Return hidden / rms(hidden) * weight by the form that runs; see `rms_norm_reference`."""
    if form() == "reference":
        return defined(rms_norm_reference, hidden, weight=weight, epsilon=epsilon)
    if form() == "native":
        return rms_norm_native(hidden, None, weight, epsilon)[1]
    return _RMSNorm.apply(hidden, weight, epsilon)


def add_rms_norm(hidden: Tensor, *, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return (norm of the sum, sum) of hidden and residual by the form that runs; see `add_rms_norm_reference`."""
    if form() == "native":
        total, normed, _ = rms_norm_native(hidden, residual, weight, epsilon)
        return normed, total
    total = hidden + residual  # rounded before it is normed: the next layer reads the same sum
    return rms_norm(total, weight=weight, epsilon=epsilon), total


def rms_norm_reference(hidden: Tensor, *, weight: Tensor, epsilon: float) -> Tensor:
    """Return hidden / rms(hidden) * weight over the last dimension; shape of hidden."""
    return hidden * (hidden.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt() * weight


def add_rms_norm_reference(
    hidden: Tensor, *, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return (norm of the sum, sum) of hidden and residual; each of their shape."""
    total = hidden + residual
    return rms_norm_reference(total, weight=weight, epsilon=epsilon), total


class _RMSNorm(torch.autograd.Function):
    """The fused form: half the passes of torch's on the CPU."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=accumulated(hidden))
        inverse = length.square_().div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, inverse)
        return torch.mul(hidden, inverse).mul_(weight).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, inverse = ctx.saved_tensors
        direction = hidden * inverse
        products = gradient * direction
        mean = (products @ weight.to(products.dtype)).unsqueeze(-1).div_(hidden.shape[-1])
        result = torch.mul(gradient, weight) - direction.mul_(mean)
        weight_gradient = products.flatten(0, -2).sum(0).to(weight.dtype)
        return result.mul_(inverse).to(hidden.dtype), weight_gradient, None


@operator("rms_norm")
def rms_norm_native(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum, its norm, inverse root mean squares (...,) float32); without a residual the sum is empty."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    total = torch.empty_like(hidden) if residual is not None else hidden.new_empty(0)
    normed, inverse = torch.empty_like(hidden), native.empty_fp32(*hidden.shape[:-1], like=hidden)
    native.run(
        *("rms_norm_forward", native.is_bf16(hidden), inverse.numel(), hidden.shape[-1], float(epsilon)),
        *(hidden, residual, weight, None if residual is None else total, normed, inverse),
    )
    return total, normed, inverse


@operator("rms_norm_backward")
def rms_norm_native_backward(
    gradient: Tensor, sum_gradient: Tensor | None, total: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of (sum, weight); that of the sum is also that of both its terms."""
    gradient, total, weight = (tensor.contiguous() for tensor in (gradient, total, weight))
    sum_gradient = None if sum_gradient is None else sum_gradient.contiguous()
    rows, columns = inverse.numel(), total.shape[-1]
    blocks = min(rows, native.BLOCKS)
    result, partials = torch.empty_like(total), native.empty_fp32(blocks, columns, like=total)
    native.run(
        *("rms_norm_backward", native.is_bf16(total), rows, columns, blocks),
        *(gradient, sum_gradient, total, weight, inverse, result, partials),
    )
    return result, partials.sum(0).to(weight.dtype)


@rms_norm_native.register_fake
def _(hidden: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden.new_empty(0) if residual is None else packed(hidden)
    return total, packed(hidden), hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)


@rms_norm_native_backward.register_fake
def _(
    gradient: Tensor, sum_gradient: Tensor | None, total: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    return packed(total), packed(weight)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.adds = inputs[1] is not None
    ctx.save_for_backward(output[0] if ctx.adds else inputs[0], inputs[2], output[2])
    ctx.mark_non_differentiable(output[2])


def _gradient(ctx: Any, sum_gradient: Tensor, gradient: Tensor, _: Tensor) -> tuple:
    hidden, weight = rms_norm_native_backward(gradient, sum_gradient if ctx.adds else None, *ctx.saved_tensors)
    return hidden, hidden if ctx.adds else None, weight, None


rms_norm_native.register_autograd(_gradient, setup_context=_keep)


def examples(draw: Draw) -> Iterator[Example]:
    """Yield the calls that the check at start-up makes."""

    def norm(hidden: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(hidden, weight=weight, epsilon=1e-5)

    def norm_of_sum(hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(hidden, residual=residual, weight=weight, epsilon=1e-5)

    yield norm, [draw(24, 64), draw(64)]
    yield norm_of_sum, [draw(24, 64), draw(24, 64), draw(64)]
