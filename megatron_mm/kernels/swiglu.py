"""SwiGLU, the activation of the feed-forward network (Shazeer 2020)."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mm.kernels import native
from megatron_mm.kernels.forms import Draw, Example, defined, form, operator, packed


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Return silu(gate) * up by the form that runs; shapes as of `swiglu_reference`. Keeps only its input."""
    if form() == "reference":
        return defined(swiglu_reference, gate_and_up)
    return swiglu_native(gate_and_up) if form() == "native" else _SwiGLU.apply(gate_and_up)


def swiglu_reference(gate_and_up: Tensor) -> Tensor:
    """Return silu(gate) * up.

    Shapes: gate_and_up (..., 2 ffn_hidden), the gate first; returns (..., ffn_hidden).
    """
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """The fused form."""

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


@operator("swiglu")
def swiglu_native(gate_and_up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    gate_and_up = gate_and_up.contiguous()
    columns = gate_and_up.shape[-1] // 2
    out = gate_and_up.new_empty(*gate_and_up.shape[:-1], columns)
    native.run("swiglu", native.is_bf16(out), _rows(out), columns, None, gate_and_up, out)
    return out


@operator("swiglu_backward")
def swiglu_native_backward(gradient: Tensor, gate_and_up: Tensor) -> Tensor:
    """Return the gradient of gate_and_up."""
    gradient, gate_and_up = gradient.contiguous(), gate_and_up.contiguous()
    result = torch.empty_like(gate_and_up)
    # Without a gradient the launcher runs the forward pass; an empty one has no address.
    if gradient.numel():
        columns = gradient.shape[-1]
        native.run("swiglu", native.is_bf16(result), _rows(gradient), columns, gradient, gate_and_up, result)
    return result


def _rows(tensor: Tensor) -> int:
    return tensor[..., 0].numel() if tensor.shape[-1] else 0


@swiglu_native.register_fake
def _(gate_and_up: Tensor) -> Tensor:
    return gate_and_up.new_empty(*gate_and_up.shape[:-1], gate_and_up.shape[-1] // 2)


@swiglu_native_backward.register_fake
def _(gradient: Tensor, gate_and_up: Tensor) -> Tensor:
    return packed(gate_and_up)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _gradient(ctx: Any, gradient: Tensor) -> Tensor:
    return swiglu_native_backward(gradient, *ctx.saved_tensors)


swiglu_native.register_autograd(_gradient, setup_context=_keep)


def examples(draw: Draw) -> Iterator[Example]:
    """Yield a call that the check at start-up makes."""
    yield swiglu, [draw(24, 64)]
