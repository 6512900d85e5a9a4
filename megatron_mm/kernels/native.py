"""The CUDA kernels of csrc/kernels: outputs are allocated here, and addresses handed to the launchers.

Each function means what its namesake in `reference` says, or a part of it; `ops` makes them torch operators. Nothing
here waits for the GPU.
"""

import torch
from torch import Tensor

try:
    from megatron_mm.kernels import _cuda
except ImportError:  # built by setup.py where nvcc is
    _cuda = None

BLOCKS = 256
"""Blocks that share the rows of a backward pass and leave a partial sum each: about two a multiprocessor."""
ROPE_HEADS, ROPE_WARPS = 32, 8
"""Heads that a block of mqa_rope turns at a time, and its warps, each of which leaves a partial sum."""
TILE = 32
"""Sorted rows of one block of token_rows' backward pass."""
UNSUPPORTED = -1


def launch(name: str, *arguments: Tensor | float | int | None) -> int:
    """Call the launcher `name` on the current stream and return its result; None is a null pointer."""
    stream = torch.cuda.current_stream().cuda_stream
    addresses = [_address(argument) if not isinstance(argument, int | float) else argument for argument in arguments]
    return _cuda.launch(name, *addresses, stream)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run(name: str, *arguments: Tensor | float | int | None) -> None:
    for argument in arguments:
        assert not isinstance(argument, Tensor) or argument.is_contiguous(), name
    error = launch(name, *arguments)
    if error == UNSUPPORTED:
        raise ValueError(f"{name}: a row or a head is wider than the kernel holds; use training.kernels=fused")
    if error:
        raise RuntimeError(f"{name} could not be launched: cudaError {error}")


def _is_bf16(tensor: Tensor) -> bool:
    assert tensor.dtype in (torch.float32, torch.bfloat16), tensor.dtype
    return tensor.dtype == torch.bfloat16


def _empty(*shape: int, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def assemble_forward(tokens: Tensor, text_type: Tensor, features: Tensor, media_row: Tensor) -> Tensor:
    """Return decoder inputs; media_row (num_tokens,) int32 is the feature of each row, -1 for text."""
    tokens, text_type, features = (tensor.contiguous() for tensor in (tokens, text_type, features))
    out = torch.empty_like(tokens)
    _run("assemble_forward", _is_bf16(tokens), *tokens.shape, tokens, text_type, features, media_row, out)
    return out


def assemble_backward(gradient: Tensor, media_row: Tensor, num_media: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (token rows, text type, features)."""
    gradient = gradient.contiguous()
    rows, columns = gradient.shape
    blocks = min(rows, BLOCKS)
    tokens, features = torch.empty_like(gradient), gradient.new_empty(num_media, columns)
    partials = _empty(blocks, columns, like=gradient)
    _run(
        *("assemble_backward", _is_bf16(gradient), rows, columns, blocks, gradient, media_row),
        *(tokens, features, partials),
    )
    return tokens, partials.sum(0).to(gradient.dtype), features


def token_rows(table: Tensor, ids: Tensor, first_id: int) -> Tensor:
    """Return the rows of `table` that `ids` name, zeros where another rank holds them."""
    table, ids = table.contiguous(), ids.contiguous()
    vocab, columns = table.shape
    out = table.new_empty(ids.shape[0], columns)
    _run("token_rows_forward", _is_bf16(table), ids.shape[0], columns, vocab, first_id, table, ids, out)
    return out


def token_rows_backward(gradient: Tensor, ids: Tensor, first_id: int, vocab: int) -> Tensor:
    """Return the gradient of the table."""
    gradient = gradient.contiguous()
    rows, columns = gradient.shape
    sorted_ids, order = ids.sort(stable=True)
    table = gradient.new_zeros(vocab, columns)
    carries = _empty(2, -(-rows // TILE), columns, like=gradient)
    _run(
        *("token_rows_backward", _is_bf16(gradient), rows, columns, vocab, first_id),
        *(gradient, sorted_ids, order, table, carries),
    )
    return table


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    gate_and_up = gate_and_up.contiguous()
    columns = gate_and_up.shape[-1] // 2
    out = gate_and_up.new_empty(*gate_and_up.shape[:-1], columns)
    _run("swiglu", _is_bf16(out), _rows(out), columns, None, gate_and_up, out)
    return out


def swiglu_backward(gradient: Tensor, gate_and_up: Tensor) -> Tensor:
    """Return the gradient of gate_and_up."""
    gradient, gate_and_up = gradient.contiguous(), gate_and_up.contiguous()
    result = torch.empty_like(gate_and_up)
    # Without a gradient the launcher runs the forward pass; an empty one has no address.
    if gradient.numel():
        _run("swiglu", _is_bf16(result), _rows(gradient), gradient.shape[-1], gradient, gate_and_up, result)
    return result


def _rows(tensor: Tensor) -> int:
    return tensor[..., 0].numel() if tensor.shape[-1] else 0


def rms_norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum, its norm, inverse root mean squares (...,) float32); without a residual the sum is empty."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    total = torch.empty_like(hidden) if residual is not None else hidden.new_empty(0)
    normed, inverse = torch.empty_like(hidden), _empty(*hidden.shape[:-1], like=hidden)
    _run(
        *("rms_norm_forward", _is_bf16(hidden), inverse.numel(), hidden.shape[-1], float(epsilon)),
        *(hidden, residual, weight, None if residual is None else total, normed, inverse),
    )
    return total, normed, inverse


def rms_norm_backward(
    gradient: Tensor, sum_gradient: Tensor | None, total: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of (sum, weight); that of the sum is also that of both its terms."""
    gradient, total, weight = (tensor.contiguous() for tensor in (gradient, total, weight))
    sum_gradient = None if sum_gradient is None else sum_gradient.contiguous()
    rows, columns = inverse.numel(), total.shape[-1]
    blocks = min(rows, BLOCKS)
    result, partials = torch.empty_like(total), _empty(blocks, columns, like=total)
    _run(
        *("rms_norm_backward", _is_bf16(total), rows, columns, blocks, gradient, sum_gradient, total, weight, inverse),
        *(result, partials),
    )
    return result, partials.sum(0).to(weight.dtype)


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


def mqa_rope(
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
    _run(
        *("mqa_rope_forward", _is_bf16(query), tokens, heads, groups, head_dim, stride, float(epsilon)),
        *(query, _memory(key_value), cos, sin, query_weight, key_weight, *outputs),
    )
    return outputs


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
    """Return the gradients of (query, key_value, query_weight, key_weight), the last two empty without a norm.

    query and key_value are needed for a norm only: a rotation's gradient needs no input.
    """
    gradients = [gradient.contiguous() for gradient in (grad_query, grad_key, grad_value)]
    tokens, heads, head_dim = grad_query.shape
    groups, has_norm = grad_key.shape[1], query_weight is not None
    query = query.contiguous() if has_norm else None
    key_value, stride = _stride(key_value) if has_norm else (None, 0)
    needed = -(-tokens * (heads + 2 * groups) // ROPE_HEADS)
    blocks = min(needed, BLOCKS) if has_norm else needed
    new_query, new_key_value = torch.empty_like(gradients[0]), grad_key.new_empty(tokens, groups, 2, head_dim)
    partials = _empty(2, blocks * ROPE_WARPS if has_norm else 0, head_dim, like=grad_query)
    _run(
        *("mqa_rope_backward", _is_bf16(grad_query), tokens, heads, groups, head_dim, stride, blocks, float(epsilon)),
        *(query, _memory(key_value) if has_norm else None, cos.contiguous(), sin.contiguous()),
        *(query_weight, key_weight, *gradients, new_query, new_key_value, partials if has_norm else None),
    )
    if not has_norm:
        return new_query, new_key_value, grad_query.new_empty(0), grad_query.new_empty(0)
    weights = partials.sum(1).to(query_weight.dtype)
    return new_query, new_key_value, weights[0].clone(), weights[1].clone()


def cross_entropy_statistics(logits: Tensor, labels: Tensor, mask: Tensor | None, first_id: int) -> Tensor:
    """Return (3, num_tokens) float32: the greatest logit, the sum of exp(logit - greatest), the label's logit or 0."""
    assert logits.is_contiguous()
    statistics = _empty(3, logits.shape[0], like=logits)
    _run(
        *("cross_entropy_statistics", _is_bf16(logits), *logits.shape, first_id, logits, labels.contiguous()),
        *(mask, statistics),
    )
    return statistics


def cross_entropy_combine(all_statistics: Tensor, mask: Tensor | None, z_loss: float) -> tuple[Tensor, Tensor]:
    """Return (losses (2, num_tokens), log_z (num_tokens,)) from the statistics of every rank, (tp, 3, num_tokens)."""
    parts, _, rows = all_statistics.shape
    losses, log_z = _empty(2, rows, like=all_statistics), _empty(rows, like=all_statistics)
    _run("cross_entropy_combine", rows, parts, float(z_loss), all_statistics.contiguous(), mask, losses, log_z)
    return losses, log_z


def cross_entropy_backward(
    logits: Tensor,
    gradient: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    log_z: Tensor,
    first_id: int,
    z_loss: float,
) -> None:
    """Write the gradient of the logits over them."""
    assert logits.is_contiguous()
    _run(
        *("cross_entropy_backward", _is_bf16(logits), *logits.shape, first_id, float(z_loss)),
        *(gradient.contiguous(), labels.contiguous(), mask, log_z, logits),
    )
