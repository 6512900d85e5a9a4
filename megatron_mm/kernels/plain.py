"""The parts of `native` in plain torch: what the operators of `ops` run on the CPU, with gradients written out.

Sums and products are FP32 and rounded once, as on a GPU. Each function has the arguments and results of its namesake in
`native`, whose docstring says what they are.
"""

import torch
from torch import Tensor

from megatron_mm.kernels import reference

BLOCK_ELEMENTS = 2**18
"""Logits that cross-entropy widens and exponentiates at a time: they stay in a core's cache, and a copy of all would
double the memory."""


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def assemble_forward(tokens: Tensor, text_type: Tensor, features: Tensor, media_row: Tensor) -> Tensor:
    """See `native.assemble_forward`."""
    positions = (media_row >= 0).nonzero().flatten()
    text = tokens + text_type
    return text.index_copy(0, positions, features[media_row[positions].long()])


def assemble_backward(gradient: Tensor, media_row: Tensor, num_media: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `native.assemble_backward`."""
    is_media = media_row >= 0
    features = gradient.new_zeros(num_media, gradient.shape[1])
    features[media_row[is_media].long()] = gradient[is_media]
    tokens = gradient.masked_fill(is_media[:, None], 0.0)
    return tokens, _wide(tokens).sum(0).to(gradient.dtype), features


def token_rows(table: Tensor, ids: Tensor, first_id: int) -> Tensor:
    """See `native.token_rows`."""
    return reference.token_rows(table, ids=ids, first_id=first_id)


def token_rows_backward(gradient: Tensor, ids: Tensor, first_id: int, vocab: int) -> Tensor:
    """See `native.token_rows_backward`."""
    here = ((ids >= first_id) & (ids < first_id + vocab)).nonzero().flatten()
    wide = _wide(gradient)
    table = wide.new_zeros(vocab, gradient.shape[1])
    return table.index_add_(0, ids[here] - first_id, wide[here]).to(gradient.dtype)


def swiglu(gate_and_up: Tensor) -> Tensor:
    """See `native.swiglu`."""
    return reference.swiglu(_wide(gate_and_up)).to(gate_and_up.dtype)


def swiglu_backward(gradient: Tensor, gate_and_up: Tensor) -> Tensor:
    """See `native.swiglu_backward`."""
    wide = _wide(gradient)
    gate, up = _wide(gate_and_up).chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return torch.cat([wide * up * (sigmoid + silu * (1.0 - sigmoid)), wide * silu], dim=-1).to(gradient.dtype)


def rms_norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `native.rms_norm`."""
    total = hidden if residual is None else hidden + residual
    wide = _wide(total)
    inverse = (wide.square().mean(dim=-1) + epsilon).rsqrt()
    normed = (wide * inverse.unsqueeze(-1) * _wide(weight)).to(hidden.dtype)
    return hidden.new_empty(0) if residual is None else total, normed, inverse


def rms_norm_backward(
    gradient: Tensor, sum_gradient: Tensor | None, total: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """See `native.rms_norm_backward`."""
    wide, direction = _wide(gradient), _wide(total) * inverse.unsqueeze(-1)
    scaled = wide * _wide(weight)
    result = inverse.unsqueeze(-1) * (scaled - direction * (scaled * direction).mean(dim=-1, keepdim=True))
    if sum_gradient is not None:
        result = result + sum_gradient
    return result.to(total.dtype), (wide * direction).flatten(0, -2).sum(0).to(weight.dtype)


def mqa_rope(
    query: Tensor,
    key_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `native.mqa_rope`."""
    weights = [None if weight is None else _wide(weight) for weight in (query_weight, key_weight)]
    outputs = reference.mqa_rope(
        *(_wide(query),),
        **{"key_value": _wide(key_value), "cos": cos, "sin": sin, "epsilon": epsilon},
        **dict(zip(("query_weight", "key_weight"), weights)),
    )
    return tuple(output.to(query.dtype, copy=True, memory_format=torch.contiguous_format) for output in outputs)


def mqa_rope_backward(
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
    """See `native.mqa_rope_backward`."""
    back = {"cos": cos.unsqueeze(1), "sin": -sin.unsqueeze(1)}  # a rotation's transpose turns it back
    turned = [reference.rotate(_wide(gradient), **back) for gradient in (grad_query, grad_key)]
    weights = [grad_query.new_empty(0)] * 2
    if query_weight is not None:
        for place, (head, weight) in enumerate(((query, query_weight), (key_value[:, :, 0], key_weight))):
            inverse = (_wide(head).square().mean(dim=-1) + epsilon).rsqrt()
            turned[place], weights[place] = rms_norm_backward(turned[place], None, _wide(head), weight, inverse)
    key_values = torch.stack([turned[1], _wide(grad_value)], dim=2)
    return turned[0].to(grad_query.dtype), key_values.to(grad_query.dtype), weights[0].clone(), weights[1].clone()


def cross_entropy_statistics(logits: Tensor, labels: Tensor, mask: Tensor | None, first_id: int) -> Tensor:
    """See `native.cross_entropy_statistics`."""
    local = labels - first_id
    elsewhere = (local < 0) | (local >= logits.shape[1])
    label_logit = _wide(logits.gather(-1, local.masked_fill(elsewhere, 0).unsqueeze(-1)).squeeze(-1))
    highest, sums = torch.empty_like(label_logit), torch.empty_like(label_logit)
    for own in _row_blocks(logits):
        torch.amax(_wide(logits[own]), dim=-1, out=highest[own])
        torch.sum((logits[own] - highest[own].unsqueeze(-1)).exp_(), dim=-1, out=sums[own])
    statistics = torch.stack([highest, sums, label_logit.masked_fill(elsewhere, 0.0)])
    if mask is None:
        return statistics
    return torch.where(mask == 0, statistics.new_tensor([[0.0], [1.0], [0.0]]), statistics)


def cross_entropy_combine(all_statistics: Tensor, mask: Tensor | None, z_loss: float) -> tuple[Tensor, Tensor]:
    """See `native.cross_entropy_combine`."""
    maxima, sums, label_logits = all_statistics.unbind(dim=1)
    highest = maxima.amax(dim=0)
    log_sum = (sums * (maxima - highest).exp()).sum(dim=0).log()
    log_z = log_sum + highest
    losses = torch.stack([log_sum - (label_logits.sum(dim=0) - highest), z_loss * log_z.square()])
    return losses if mask is None else losses.masked_fill(mask == 0, 0.0), log_z


def cross_entropy_backward(
    logits: Tensor,
    gradient: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    log_z: Tensor,
    first_id: int,
    z_loss: float,
) -> None:
    """See `native.cross_entropy_backward`."""
    dead = None if mask is None or mask.all() else mask == 0
    if dead is not None:
        gradient = gradient.masked_fill(dead, 0.0)
    scale = gradient[0] + gradient[1] * (2.0 * z_loss) * log_z
    local = labels - first_id
    elsewhere = ((local < 0) | (local >= logits.shape[1])).unsqueeze(-1)
    local = local.unsqueeze(-1).masked_fill(elsewhere, 0)
    label_gradient = -gradient[0].unsqueeze(-1).masked_fill(elsewhere, 0.0)
    wide = logits.dtype == log_z.dtype
    for own in _row_blocks(logits):
        block = logits[own].sub_(log_z[own].unsqueeze(-1)) if wide else logits[own] - log_z[own].unsqueeze(-1)
        block.exp_().mul_(scale[own].unsqueeze(-1))
        if dead is not None:
            block.masked_fill_(dead[own].unsqueeze(-1), 0.0)  # their logits may be anything
        block.scatter_add_(-1, local[own], label_gradient[own])
        if not wide:
            logits[own] = block


def _row_blocks(logits: Tensor) -> list[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, logits.shape[1]))
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]
