"""Queries, keys and values of attention, normed if the model asks for it and turned: rotary embedding, non-interleaved
(Su et al. 2021; Llama)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_mm.kernels import native
from megatron_mm.kernels.forms import Draw, Example, defined, form, operator, packed
from megatron_mm.kernels.rms_norm import rms_norm, rms_norm_reference

HEADS, WARPS = 32, 8
"""Heads that a block of the CUDA kernel turns at a time, and its warps, each of which leaves a partial sum."""


def mqa_rope(
    query: Tensor,
    *,
    key_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (query, key, value) of attention by the form that runs; see `mqa_rope_reference`. cos and sin are float32,
    and no gradient flows to them."""
    if form() == "native":
        return mqa_rope_native(query, key_value, cos, sin, query_weight, key_weight, epsilon)
    if form() == "reference":
        norms = {"query_weight": query_weight, "key_weight": key_weight, "epsilon": epsilon}
        return defined(mqa_rope_reference, query, key_value=key_value, cos=cos, sin=sin, **norms)
    key, value = key_value.unbind(dim=2)
    if query_weight is not None:
        query = rms_norm(query, weight=query_weight, epsilon=epsilon)
        key = rms_norm(key, weight=key_weight, epsilon=epsilon)
    angles = cos.unsqueeze(1).to(query.dtype), sin.unsqueeze(1).to(query.dtype)
    return _Rotate.apply(query, *angles), _Rotate.apply(key, *angles), value


def mqa_rope_reference(
    query: Tensor,
    *,
    key_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (query, key, value) of attention: keys and values apart, queries and keys normed and turned.

    Shapes: query (num_tokens, heads/tp, head_dim); key_value (num_tokens, groups, 2, head_dim); cos, sin (num_tokens,
    head_dim/2) of each token's position in its document; the weights (head_dim,), or None for no norm.
    """
    key, value = key_value.unbind(dim=2)
    if query_weight is not None:
        query = rms_norm_reference(query, weight=query_weight, epsilon=epsilon)
        key = rms_norm_reference(key, weight=key_weight, epsilon=epsilon)
    angles = {"cos": cos.unsqueeze(1), "sin": sin.unsqueeze(1)}  # (num_tokens, 1, head_dim/2)
    return rotate_reference(query, **angles), rotate_reference(key, **angles), value


def rotate_reference(heads: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `heads` turned by the angle of each position.

    Shapes: heads (num_tokens, num_heads, head_dim); cos, sin (num_tokens, 1, head_dim/2); returns the shape of heads.
    """
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _Rotate(torch.autograd.Function):
    """The fused form of a rotation, without a copy of its halves."""

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


@operator("mqa_rope")
def mqa_rope_native(
    query: Tensor,
    key_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (query, key, value) of attention."""
    query, cos, sin = (tensor.contiguous() for tensor in (query, cos, sin))
    key_value, stride = _stride(key_value)
    tokens, heads, head_dim = query.shape
    groups = key_value.shape[1]
    outputs = (torch.empty_like(query), *(query.new_empty(tokens, groups, head_dim) for _ in range(2)))
    native.run(
        *("mqa_rope_forward", native.is_bf16(query), tokens, heads, groups, head_dim, stride, float(epsilon)),
        *(query, _memory(key_value), cos, sin, query_weight, key_weight, *outputs),
    )
    return outputs


@operator("mqa_rope_backward")
def mqa_rope_native_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    query: Tensor | None,
    key_value: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (query, key_value, query_weight, key_weight), the last two empty without a norm.

    query and key_value are needed for a norm only: a rotation's gradient needs no input.
    """
    gradients = [gradient.contiguous() for gradient in (grad_query, grad_key, grad_value)]
    tokens, heads, head_dim = grad_query.shape
    groups, has_norm, bf16 = grad_key.shape[1], query_weight is not None, native.is_bf16(grad_query)
    query = query.contiguous() if has_norm else None
    key_value, stride = _stride(key_value) if has_norm else (None, 0)
    needed = -(-tokens * (heads + 2 * groups) // HEADS)
    blocks = min(needed, native.BLOCKS) if has_norm else needed
    new_query, new_key_value = torch.empty_like(gradients[0]), grad_key.new_empty(tokens, groups, 2, head_dim)
    partials = native.empty_fp32(2, blocks * WARPS if has_norm else 0, head_dim, like=grad_query)
    native.run(
        *("mqa_rope_backward", bf16, tokens, heads, groups, head_dim, stride, blocks, float(epsilon)),
        *(query, _memory(key_value) if has_norm else None, cos.contiguous(), sin.contiguous()),
        *(query_weight, key_weight, *gradients, new_query, new_key_value, partials if has_norm else None),
    )
    if not has_norm:
        return new_query, new_key_value, grad_query.new_empty(0), grad_query.new_empty(0)
    weights = partials.sum(1).to(query_weight.dtype)
    return new_query, new_key_value, weights[0].clone(), weights[1].clone()


def _stride(key_value: Tensor) -> tuple[Tensor, int]:
    """Return keys and values whose tokens are packed, and the distance of tokens: part of a wider row needs no copy."""
    if key_value.shape[0] > 1 and key_value[0].is_contiguous():
        return key_value, key_value.stride(0)
    return key_value.contiguous(), key_value[0].numel() if len(key_value) else 0


def _memory(key_value: Tensor) -> Tensor:
    """Return the same memory as one packed vector: what a launcher is handed."""
    if key_value.is_contiguous():
        return key_value
    size = 1 + sum((length - 1) * stride for length, stride in zip(key_value.shape, key_value.stride()))
    return key_value.as_strided((size,), (1,))


@mqa_rope_native.register_fake
def _(
    query: Tensor,
    key_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, groups, _, head_dim = key_value.shape
    return packed(query), query.new_empty(tokens, groups, head_dim), query.new_empty(tokens, groups, head_dim)


@mqa_rope_native_backward.register_fake
def _(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    query: Tensor | None,
    key_value: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, groups, head_dim = grad_key.shape
    weights = [grad_query.new_empty(0 if weight is None else head_dim) for weight in (query_weight, key_weight)]
    return packed(grad_query), grad_query.new_empty(tokens, groups, 2, head_dim), *weights


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key_value, cos, sin, query_weight, key_weight, ctx.epsilon = inputs
    ctx.has_norm = query_weight is not None
    ctx.save_for_backward(*((query, key_value) if ctx.has_norm else ()), cos, sin, query_weight, key_weight)


def _gradient(ctx: Any, *gradients: Tensor) -> tuple:
    saved = ctx.saved_tensors if ctx.has_norm else (None, None, *ctx.saved_tensors)
    query, key_value, *weights = mqa_rope_native_backward(*gradients, *saved, ctx.epsilon)
    return query, key_value, None, None, *(weights if ctx.has_norm else (None, None)), None


mqa_rope_native.register_autograd(_gradient, setup_context=_keep)


def examples(draw: Draw) -> Iterator[Example]:
    """Yield the calls that the check at start-up makes."""
    query, key_value, weights = draw(24, 4, 16), draw(24, 1, 2, 16), [draw(16), draw(16)]
    angles = torch.outer(torch.arange(24), torch.linspace(1, 0.1, 8)).to(query.device)
    turn = {"cos": angles.cos(), "sin": angles.sin()}

    def rope(query: Tensor, key_value: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return mqa_rope(query, key_value=key_value, **turn, **dict(zip(("query_weight", "key_weight"), weights)))

    yield rope, [query, key_value]
    yield rope, [query, key_value, *weights]
