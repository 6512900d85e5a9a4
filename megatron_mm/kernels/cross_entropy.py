"""Cross-entropy over a vocabulary that is cut over the tensor ranks, from logits or straight from hidden states.

Three numbers a token cross the ranks, in one all-gather: what each rank's part of the softmax is known by.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm.kernels import ops


def vocab_parallel_cross_entropy(
    logits: Tensor, *, labels: Tensor, mask: Tensor | None = None, z_loss: float, group: dist.ProcessGroup | None
) -> Tensor:
    """Return the cross-entropy and z-loss of each token; see `reference.cross_entropy`.

    Shapes: logits (num_tokens, vocab/tp) packed, destroyed by the backward pass, which writes their gradient over them;
    labels (num_tokens,) ids; mask (num_tokens,) float32: rows where it is 0 are not read; returns (2, num_tokens)
    float32. Collective over `group` (tp): one all-gather of three numbers a token; None is a single rank.
    """
    return _CrossEntropy.apply(logits, labels, mask, z_loss, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, mask: Tensor | None, z_loss: float, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.first_id, ctx.z_loss = _rank(group) * logits.shape[1], z_loss
        statistics = ops.cross_entropy_statistics(logits, labels, mask, ctx.first_id)
        losses, log_z = ops.cross_entropy_combine(_gathered(statistics, group), mask, z_loss)
        ctx.save_for_backward(logits, labels, mask, log_z)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, labels, mask, log_z = ctx.saved_tensors
        ops.cross_entropy_backward(logits, gradient, labels, mask, log_z, ctx.first_id, ctx.z_loss)
        return logits, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    *,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    z_loss: float,
    group: dist.ProcessGroup | None,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Return what `vocab_parallel_cross_entropy` returns of hidden @ weight.T, never holding those logits whole.

    Logits are made `chunk_tokens` at a time, and once more in the backward pass: a third more arithmetic in the head
    for chunk_tokens / num_tokens of its memory. Shapes: hidden (num_tokens, hidden), the same on every rank; weight
    (vocab/tp, hidden). Collective over `group` as there; the gradient of `hidden` is this rank's part of a sum over
    `group`, which the operation that gathered it reduces.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, mask, z_loss, group, chunk_tokens)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        z_loss: float,
        group: dist.ProcessGroup | None,
        chunk_tokens: int,
    ) -> Tensor:
        ctx.first_id, ctx.z_loss, ctx.chunk_tokens = _rank(group) * weight.shape[0], z_loss, chunk_tokens
        statistics = [
            ops.cross_entropy_statistics(part @ weight.t(), labels[own], _part(mask, own), ctx.first_id)
            for part, own in _chunks(hidden, chunk_tokens)
        ]
        losses, log_z = ops.cross_entropy_combine(_gathered(torch.cat(statistics, dim=1), group), mask, z_loss)
        ctx.save_for_backward(hidden, weight, labels, mask, log_z)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        hidden, weight, labels, mask, log_z = ctx.saved_tensors
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=log_z.dtype)  # sums of chunks are not rounded
        for part, own in _chunks(hidden, ctx.chunk_tokens):
            logits = part @ weight.t()  # (chunk_tokens, vocab/tp)
            ops.cross_entropy_backward(
                logits, gradient[:, own], labels[own], _part(mask, own), log_z[own], ctx.first_id, ctx.z_loss
            )
            hidden_gradient[own] = logits @ weight
            weight_gradient += logits.t() @ part
        return hidden_gradient, weight_gradient.to(weight.dtype), None, None, None, None, None


def _chunks(hidden: Tensor, chunk_tokens: int) -> list[tuple[Tensor, slice]]:
    """Return the chunks of `hidden` and where each lies; one empty chunk if there are no tokens."""
    starts = range(0, max(hidden.shape[0], 1), chunk_tokens)
    slices = [slice(start, min(start + chunk_tokens, hidden.shape[0])) for start in starts]
    return [(hidden[own], own) for own in slices]


def _part(mask: Tensor | None, own: slice) -> Tensor | None:
    return None if mask is None else mask[own]


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


def _gathered(statistics: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the statistics of every rank: (3, num_tokens) to (tp, 3, num_tokens). Collective over `group`."""
    if group is None or group.size() == 1:
        return statistics.unsqueeze(0)
    everyone = statistics.new_empty(group.size(), *statistics.shape)
    dist.all_gather_into_tensor(
        everyone.flatten(0, 1), statistics, group=group
    )  # gloo wants the ranks in one dimension
    return everyone
