"""Cross-entropy over a vocabulary that is cut over the tensor ranks, from logits or straight from hidden states.

Three numbers a token cross the ranks, in one all-gather: what each rank's part of the softmax is known by. The
reference form gathers the logits of the whole vocabulary and applies the definition.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_mm.kernels import ops, reference


def vocab_parallel_cross_entropy(
    logits: Tensor, *, labels: Tensor, mask: Tensor | None = None, z_loss: float, group: dist.ProcessGroup | None
) -> Tensor:
    """Return the cross-entropy and z-loss of each token; see `reference.cross_entropy`.

    Shapes: logits (num_tokens, vocab/tp) packed, destroyed by the backward pass, which writes their gradient over them
    (not in the reference form); labels (num_tokens,) ids; mask (num_tokens,) float32: rows where it is 0 are not read;
    returns (2, num_tokens) float32. Collective over `group` (tp): one all-gather of three numbers a token, of all
    logits in the reference form; None is a single rank.
    """
    if ops.form() == "reference":
        return _defined(logits, labels, mask, z_loss, group)
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


def _defined(
    logits: Tensor, labels: Tensor, mask: Tensor | None, z_loss: float, group: dist.ProcessGroup | None
) -> Tensor:
    """Return the definition over the logits of all ranks, in FP32 at least. Collective over `group`."""
    wide = logits.float() if logits.dtype == torch.bfloat16 else logits
    whole = wide if group is None or group.size() == 1 else _WholeVocabulary.apply(wide, group)
    return reference.cross_entropy(whole, labels=labels, mask=mask, z_loss=z_loss)


class _WholeVocabulary(torch.autograd.Function):
    """(num_tokens, vocab/tp) to (num_tokens, vocab), on every rank.

    All ranks compute the same losses of it, so each has the whole gradient already and takes its own columns.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(logits) for _ in range(group.size())]
        dist.all_gather(parts, logits.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.group.size(), dim=1)[ctx.group.rank()], None


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
    if ops.form() == "reference":
        wide = weight.float() if weight.dtype == torch.bfloat16 else weight  # sums of chunks are not rounded

        def part_of(part: Tensor, own: slice) -> Tensor:
            logits = part @ wide.to(weight.dtype).t()
            return _defined(logits, labels[own], _part(mask, own), z_loss, group)

        parts = [checkpoint(part_of, *chunk, use_reentrant=False) for chunk in _chunks(hidden, chunk_tokens)]
        return torch.cat(parts, dim=1)
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
