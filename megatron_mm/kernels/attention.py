"""Causal attention of one document: its definition, and a form for CPUs where heads share their keys.

torch's CPU kernel multiplies the queries of each head with the keys on their own. Where heads share their keys (Shazeer
2019), a block of positions needs one product for all of them, large enough to run at the processor's speed: the stacked
form makes them rows of one matrix. The other forms are torch's and flash-attn's own: see `model.core_attention`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCRATCH_ELEMENTS = 2**18
"""Scores that are held at a time: they and their softmax stay in the caches of a core or two."""
MAX_POSITIONS = 64
"""Positions of a block: of larger ones, causality hides more of what is computed."""
MAX_KEYS = 512
"""Beyond it a block that fits the scratch has fewer than 512 rows, and torch's kernel, whose blocks grow, wins."""
MIN_WORK = 3 * 2**16
"""Products of a position with all keys, below which the calls of this form cost more than they save."""


def attention_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the causal attention of the last positions of one document (Vaswani et al. 2017).

    Head h of the queries reads group h * groups // heads of the keys (Shazeer 2019). Shapes: query (num_queries, heads,
    head_dim); key and value (num_keys, groups, head_dim), num_keys >= num_queries; returns the shape of the query.
    """
    shared = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(shared, dim=1) for part in (key, value))  # (num_keys, heads, head_dim)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[2] ** 0.5
    first = key.shape[0] - query.shape[0]  # the position of the first query
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(first + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, float("-inf")).softmax(dim=-1), value)


def stacking_pays(query: Tensor, key: Tensor) -> bool:
    """Return whether the stacked form takes these operands and is faster with them than torch's kernel, as measured by
    `benchmarks/stacked_attention.py`. Shapes as of `stacked_attention`."""
    shared = query.shape[1] // key.shape[1]
    worth = key.shape[0] <= MAX_KEYS and shared * query.shape[2] * key.shape[0] >= MIN_WORK
    return query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64) and worth


def stacking_ever_pays(*, shared: int, head_dim: int, seq_len: int) -> bool:
    """Return whether a document of some length that fits into `seq_len` is long enough for `stacking_pays`, with
    `shared` query heads a key head."""
    return shared * head_dim * min(seq_len, MAX_KEYS) >= MIN_WORK


def stacked_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend causally from the last positions of one document; keeps only its operands for the backward pass.

    Shapes: query (num_queries, heads, head_dim); key and value (num_keys, groups, head_dim), num_keys >= num_queries;
    returns the shape of the query.
    """
    return _StackedAttention.apply(query, key, value)


class _Block(NamedTuple):
    """Consecutive positions of a document, in all heads of one group: a row for each position and head."""

    group: int
    positions: slice
    seen: slice
    """The keys that its last position may read."""
    probabilities: Tensor
    """(rows, seen keys): softmax of the scores."""
    scratch: Tensor
    """(rows, seen keys), to write to: the scores are no longer needed."""


class _StackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        queries = _by_group(query, key.shape[1])
        context = torch.empty_like(queries)
        for group, positions, seen, probabilities, _ in _blocks(queries, key):
            torch.mm(probabilities, value[seen, group], out=_rows(context[group, positions]))
        return _by_position(context)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors
        queries, gradients = (_by_group(part, key.shape[1]) for part in (query, gradient))
        scale = query.shape[-1] ** -0.5
        grad_queries = torch.empty_like(queries)
        grad_key, grad_value = (key.new_zeros(key.shape[1], key.shape[0], key.shape[2]) for _ in range(2))
        for group, positions, seen, probabilities, scores in _blocks(queries, key):
            own, above = _rows(queries[group, positions]), _rows(gradients[group, positions])
            grad_value[group, seen].addmm_(probabilities.t(), above)
            torch.mm(above, value[seen, group].t(), out=scores)
            torch.ops.aten._softmax_backward_data.out(scores, probabilities, -1, scores.dtype, grad_input=scores)
            grad_key[group, seen].addmm_(scores.t(), own, alpha=scale)
            through = _rows(grad_queries[group, positions])
            torch.addmm(through, scores, key[seen, group], beta=0, alpha=scale, out=through)
        return _by_position(grad_queries), grad_key.transpose(0, 1), grad_value.transpose(0, 1)


def _blocks(queries: Tensor, key: Tensor) -> Iterator[_Block]:
    """Yield every block of (groups, num_queries, shared, head_dim) queries; the next one overwrites its tensors."""
    groups, num_queries, shared, head_dim = queries.shape
    num_keys = key.shape[0]
    most = max(1, min(MAX_POSITIONS, SCRATCH_ELEMENTS // (shared * num_keys)))
    scratch = queries.new_empty(2, min(most, num_queries) * shared * num_keys)
    hidden = torch.ones(most, most, dtype=torch.bool).triu(1).unsqueeze(1)
    for group in range(groups):
        for start in range(0, num_queries, most):
            stop = min(start + most, num_queries)
            length, last = stop - start, num_keys - num_queries + stop
            scores, probabilities = (part[: length * shared * last].view(-1, last) for part in scratch)
            own, seen = _rows(queries[group, start:stop]), slice(0, last)
            torch.addmm(scores, own, key[seen, group].t(), beta=0, alpha=head_dim**-0.5, out=scores)
            later = scores.view(length, shared, last)[:, :, last - length :]
            later.masked_fill_(hidden[:length, :, :length], float("-inf"))
            torch.softmax(scores, dim=-1, out=probabilities)
            yield _Block(group, slice(start, stop), seen, probabilities, scores)


def _by_group(heads: Tensor, groups: int) -> Tensor:
    """(positions, heads, head_dim) to contiguous (groups, positions, heads that share a key, head_dim)."""
    return heads.unflatten(1, (groups, -1)).transpose(0, 1).contiguous()


def _by_position(heads: Tensor) -> Tensor:
    """The inverse of `_by_group`."""
    return heads.transpose(0, 1).flatten(1, 2)


def _rows(block: Tensor) -> Tensor:
    """(positions, shared, head_dim) to (rows, head_dim), without a copy."""
    return block.view(-1, block.shape[-1])
