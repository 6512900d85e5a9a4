"""Kernels in torch that keep and move less than autograd would: what runs where no native form is built.

Each means what `reference` says of it; one test compares both.
"""

from typing import Any

import torch
from torch import Tensor


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Return silu(gate) * up, keeping only its input for the backward pass; see `reference.swiglu`."""
    return _SwiGLU.apply(gate_and_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        # Into a tensor of ours: on a CPU, torch 2.14 takes twice the time where it allocates for an operand with gaps.
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        return torch.ops.aten.silu.out(gate, out=out).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        gate_gradient, up_gradient = result.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=up_gradient).mul_(gradient)
        through_up = torch.mul(gradient, up, out=torch.empty_like(gradient))
        torch.ops.aten.silu_backward.grad_input(through_up, gate, grad_input=gate_gradient)
        return result


def rms_norm(hidden: Tensor, *, weight: Tensor, epsilon: float) -> Tensor:
    """Return hidden / rms(hidden) * weight with half the passes of torch's on the CPU; see `reference.rms_norm`."""
    return _RMSNorm.apply(hidden, weight, epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=_accumulated(hidden))
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


def _accumulated(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype


def rotate(heads: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `heads` turned by the angle of each position, without a copy of its halves; see `reference.rotate`.

    No gradient flows to cos and sin.
    """
    return _Rotate.apply(heads, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(heads, cos, sin, direction=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _turned(gradient, *ctx.saved_tensors, direction=-1), None, None  # a rotation's transpose turns it back


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, *, direction: int) -> Tensor:
    turned = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    (first, second), (new_first, new_second) = heads.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin, value=direction)
    return turned
