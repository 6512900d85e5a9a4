"""Kernels as torch operators, and the one place that chooses which form of each runs.

A kernel has three forms: `reference` is its definition, `fused` (with `plain`, for cross-entropy) is torch that keeps
and moves less, `native` is CUDA. An operator `torch.ops.megatron_mm.X` runs `native.X` on a GPU where `select` has
chosen the native kernels, and `plain.X` elsewhere. The functions below run the form that was chosen.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_mm.errors import ConfigError
from megatron_mm.kernels import check, fused, native, plain, reference

Form = Literal["reference", "fused", "native"]

_form: Form = "fused"


def select(choice: str, device: torch.device) -> Form:
    """Decide which form of the kernels runs from now on and return its name.

    `choice` is training.kernels; 'auto' is 'native' where that can be had and 'fused' elsewhere. Raises ConfigError if
    'native' is asked for and cannot be had, or computes something else than the plain form here.
    """
    global _form
    missing = None
    if native._cuda is None:
        missing = "the CUDA extension is not built (nvcc was not found when the package was installed)"
    elif device.type != "cuda":
        missing = f"native kernels run on a GPU and this rank is on {device.type}"
    if choice == "native" and missing:
        raise ConfigError(f"training.kernels=native, but {missing}. Use training.kernels=auto.")
    _form = ("fused" if missing else "native") if choice == "auto" else choice
    if _form == "native" and (wrong := check.disagreements(device)):
        raise ConfigError(
            "these native kernels do not compute on this rank's GPU what they should: " + "; ".join(wrong) + ". Use "
            "training.kernels=fused, and report this."
        )
    return _form


@contextmanager
def running(form: Form) -> Iterator[None]:
    """Run `form` inside, on any device: 'native' is right for fake tensors, which run nothing."""
    global _form
    before, _form = _form, form
    try:
        yield
    finally:
        _form = before


def form() -> Form:
    """Return which form runs."""
    return _form


def defined(function: Callable[..., Any], *tensors: Tensor, **settings: Any) -> Any:
    """Return what a definition of `reference` gives, computed in FP32 at least and rounded once to the type of the
    first tensor; its gradients likewise."""

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value

    dtype = tensors[0].dtype
    found = function(*map(wide, tensors), **{name: wide(value) for name, value in settings.items()})
    return tuple(part.to(dtype) for part in found) if isinstance(found, tuple) else found.to(dtype)


def assemble_embeddings(tokens: Tensor, *, text_type: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Assemble decoder inputs; see `reference.assemble_embeddings`."""
    if _form == "native":
        return assemble_forward(tokens, text_type, features, media_rows(tokens, positions))
    operands = {"text_type": text_type, "features": features, "positions": positions}
    if _form == "reference":
        return defined(reference.assemble_embeddings, tokens, **operands)
    return reference.assemble_embeddings(tokens, **operands)


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Return silu(gate) * up; see `reference.swiglu`."""
    if _form == "reference":
        return defined(reference.swiglu, gate_and_up)
    return swiglu_forward(gate_and_up) if _form == "native" else fused.swiglu(gate_and_up)


def rms_norm(hidden: Tensor, *, weight: Tensor, epsilon: float) -> Tensor:
    """Return hidden / rms(hidden) * weight; see `reference.rms_norm`."""
    if _form == "reference":
        return defined(reference.rms_norm, hidden, weight=weight, epsilon=epsilon)
    if _form == "native":
        return rms_norm_forward(hidden, None, weight, epsilon)[1]
    return fused.rms_norm(hidden, weight=weight, epsilon=epsilon)


def add_rms_norm(hidden: Tensor, *, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return (norm of the sum, sum) of hidden and residual; see `reference.add_rms_norm`."""
    if _form == "native":
        total, normed, _ = rms_norm_forward(hidden, residual, weight, epsilon)
        return normed, total
    total = hidden + residual  # rounded before it is normed: the next layer reads the same sum
    return rms_norm(total, weight=weight, epsilon=epsilon), total


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
    """Return (query, key, value) of attention; see `reference.mqa_rope`. cos and sin are float32."""
    if _form == "native":
        return mqa_rope_forward(query, key_value, cos, sin, query_weight, key_weight, epsilon)
    if _form == "reference":
        norms = {"query_weight": query_weight, "key_weight": key_weight, "epsilon": epsilon}
        return defined(reference.mqa_rope, query, key_value=key_value, cos=cos, sin=sin, **norms)
    key, value = key_value.unbind(dim=2)
    if query_weight is not None:
        query = fused.rms_norm(query, weight=query_weight, epsilon=epsilon)
        key = fused.rms_norm(key, weight=key_weight, epsilon=epsilon)
    angles = {"cos": cos.unsqueeze(1).to(query.dtype), "sin": sin.unsqueeze(1).to(query.dtype)}
    return fused.rotate(query, **angles), fused.rotate(key, **angles), value


def token_rows(table: Tensor, *, ids: Tensor, first_id: int) -> Tensor:
    """Return the rows of this rank's part of an embedding table; see `reference.token_rows`."""
    if _form == "native":
        return token_rows_forward(table, ids, first_id)
    if _form == "reference":
        return defined(reference.token_rows, table, ids=ids, first_id=first_id)
    return reference.token_rows(table, ids=ids, first_id=first_id)


def media_rows(tokens: Tensor, positions: Tensor) -> Tensor:
    """Return which feature stands in each of the rows `tokens`: (num_tokens,) int32, -1 for none."""
    rows = torch.full((tokens.shape[0],), -1, dtype=torch.int32, device=tokens.device)
    return rows.index_copy(0, positions, torch.arange(positions.numel(), dtype=torch.int32, device=tokens.device))


def _operator(name: str, mutates: tuple[str, ...] = ()) -> torch.library.CustomOpDef:
    """Make `name` an operator: plain anywhere, native on a GPU where that form runs."""

    @functools.wraps(getattr(plain, name))
    def anywhere(*arguments: Any) -> Any:
        return getattr(plain, name)(*arguments)

    def on_a_gpu(*arguments: Any) -> Any:
        return getattr(native if _form == "native" else plain, name)(*arguments)

    operator = torch.library.custom_op(f"megatron_mm::{name}", anywhere, mutates_args=mutates)
    operator.register_kernel("cuda")(on_a_gpu)
    return operator


assemble_forward = _operator("assemble_forward")
assemble_backward = _operator("assemble_backward")
token_rows_forward = _operator("token_rows")
token_rows_backward = _operator("token_rows_backward")
swiglu_forward = _operator("swiglu")
swiglu_backward = _operator("swiglu_backward")
rms_norm_forward = _operator("rms_norm")
rms_norm_backward = _operator("rms_norm_backward")
mqa_rope_forward = _operator("mqa_rope")
mqa_rope_backward = _operator("mqa_rope_backward")
cross_entropy_statistics = _operator("cross_entropy_statistics")
cross_entropy_combine = _operator("cross_entropy_combine")
cross_entropy_backward = _operator("cross_entropy_backward", mutates=("logits",))

# What each returns, for torch.compile and FakeTensor: new packed tensors.


def _accumulated(like: Tensor) -> torch.dtype:
    return torch.float32 if like.dtype == torch.bfloat16 else like.dtype


def _packed(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@assemble_forward.register_fake
def _(tokens: Tensor, text_type: Tensor, features: Tensor, media_row: Tensor) -> Tensor:
    return _packed(tokens)


@assemble_backward.register_fake
def _(gradient: Tensor, media_row: Tensor, num_media: int) -> tuple[Tensor, Tensor, Tensor]:
    columns = gradient.shape[1]
    return _packed(gradient), gradient.new_empty(columns), gradient.new_empty(num_media, columns)


@token_rows_forward.register_fake
def _(table: Tensor, ids: Tensor, first_id: int) -> Tensor:
    return table.new_empty(ids.shape[0], table.shape[1])


@token_rows_backward.register_fake
def _(gradient: Tensor, ids: Tensor, first_id: int, vocab: int) -> Tensor:
    return gradient.new_empty(vocab, gradient.shape[1])


@swiglu_forward.register_fake
def _(gate_and_up: Tensor) -> Tensor:
    return gate_and_up.new_empty(*gate_and_up.shape[:-1], gate_and_up.shape[-1] // 2)


@swiglu_backward.register_fake
def _(gradient: Tensor, gate_and_up: Tensor) -> Tensor:
    return _packed(gate_and_up)


@rms_norm_forward.register_fake
def _(hidden: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden.new_empty(0) if residual is None else _packed(hidden)
    return total, _packed(hidden), hidden.new_empty(hidden.shape[:-1], dtype=_accumulated(hidden))


@rms_norm_backward.register_fake
def _(
    gradient: Tensor, sum_gradient: Tensor | None, total: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    return _packed(total), _packed(weight)


@mqa_rope_forward.register_fake
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
    return _packed(query), query.new_empty(tokens, groups, head_dim), query.new_empty(tokens, groups, head_dim)


@mqa_rope_backward.register_fake
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
    return _packed(grad_query), grad_query.new_empty(tokens, groups, 2, head_dim), *weights


@cross_entropy_statistics.register_fake
def _(logits: Tensor, labels: Tensor, mask: Tensor | None, first_id: int) -> Tensor:
    return logits.new_empty(3, logits.shape[0], dtype=_accumulated(logits))


@cross_entropy_combine.register_fake
def _(all_statistics: Tensor, mask: Tensor | None, z_loss: float) -> tuple[Tensor, Tensor]:
    rows = all_statistics.shape[2]
    return all_statistics.new_empty(2, rows), all_statistics.new_empty(rows)


@cross_entropy_backward.register_fake
def _(
    logits: Tensor,
    gradient: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    log_z: Tensor,
    first_id: int,
    z_loss: float,
) -> None:
    return None


# Gradients. Only what they need is kept.


def _keep_assemble(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.num_media = inputs[2].shape[0]
    ctx.save_for_backward(inputs[3])


def _assemble_gradient(ctx, gradient: Tensor) -> tuple:
    return *assemble_backward(gradient, *ctx.saved_tensors, ctx.num_media), None


def _keep_token_rows(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.first_id, ctx.vocab = inputs[2], inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _token_rows_gradient(ctx, gradient: Tensor) -> tuple:
    return token_rows_backward(gradient, *ctx.saved_tensors, ctx.first_id, ctx.vocab), None, None


def _keep_swiglu(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _swiglu_gradient(ctx, gradient: Tensor) -> Tensor:
    return swiglu_backward(gradient, *ctx.saved_tensors)


def _keep_rms_norm(ctx, inputs: tuple, output: tuple) -> None:
    ctx.adds = inputs[1] is not None
    ctx.save_for_backward(output[0] if ctx.adds else inputs[0], inputs[2], output[2])
    ctx.mark_non_differentiable(output[2])


def _rms_norm_gradient(ctx, sum_gradient: Tensor, gradient: Tensor, _: Tensor) -> tuple:
    hidden, weight = rms_norm_backward(gradient, sum_gradient if ctx.adds else None, *ctx.saved_tensors)
    return hidden, hidden if ctx.adds else None, weight, None


def _keep_mqa_rope(ctx, inputs: tuple, output: tuple) -> None:
    query, key_value, cos, sin, query_weight, key_weight, ctx.epsilon = inputs
    ctx.has_norm = query_weight is not None
    ctx.save_for_backward(*((query, key_value) if ctx.has_norm else ()), cos, sin, query_weight, key_weight)


def _mqa_rope_gradient(ctx, *gradients: Tensor) -> tuple:
    saved = ctx.saved_tensors if ctx.has_norm else (None, None, *ctx.saved_tensors)
    query, key_value, *weights = mqa_rope_backward(*gradients, *saved, ctx.epsilon)
    return query, key_value, None, None, *(weights if ctx.has_norm else (None, None)), None


assemble_forward.register_autograd(_assemble_gradient, setup_context=_keep_assemble)
token_rows_forward.register_autograd(_token_rows_gradient, setup_context=_keep_token_rows)
swiglu_forward.register_autograd(_swiglu_gradient, setup_context=_keep_swiglu)
rms_norm_forward.register_autograd(_rms_norm_gradient, setup_context=_keep_rms_norm)
mqa_rope_forward.register_autograd(_mqa_rope_gradient, setup_context=_keep_mqa_rope)
