"""Cross-entropy over a vocabulary that is cut over the tensor ranks, from logits or straight from hidden states.

Three numbers a token cross the ranks, in one all-gather: what each rank's part of the softmax is known by. The
reference form gathers the logits of the whole vocabulary and applies the definition.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_mm.kernels import native
from megatron_mm.kernels.forms import Draw, Example, accumulated, form, operator, wide

BLOCK_ELEMENTS = 2**18
"""Logits that the fused form widens and exponentiates at a time: they stay in a core's cache, and a copy of all would
double the memory."""


def vocab_parallel_cross_entropy(
    logits: Tensor, *, labels: Tensor, mask: Tensor | None = None, z_loss: float, group: dist.ProcessGroup | None
) -> Tensor:
    """Return the cross-entropy and z-loss of each token; see `cross_entropy_reference`.

    Shapes: logits (num_tokens, vocab/tp) packed, destroyed by the backward pass, which writes their gradient over them
    (not in the reference form); labels (num_tokens,) ids; mask (num_tokens,) float32: rows where it is 0 are not read;
    returns (2, num_tokens) float32. Collective over `group` (tp): one all-gather of three numbers a token, of all
    logits in the reference form; None is a single rank.
    """
    if form() == "reference":
        return _defined(logits, labels, mask, z_loss, group)
    return _CrossEntropy.apply(logits, labels, mask, z_loss, group)


def cross_entropy_reference(logits: Tensor, *, labels: Tensor, mask: Tensor | None, z_loss: float) -> Tensor:
    """Return cross-entropy and z_loss log(Z)^2 of each token, Z the softmax's denominator; 0 where mask is 0.

    Shapes: logits (num_tokens, vocab), the whole vocabulary; labels, mask (num_tokens,); returns (2, num_tokens).
    """
    losses = torch.stack(
        [F.cross_entropy(logits, labels, reduction="none"), z_loss * logits.logsumexp(dim=-1).square()]
    )
    return losses if mask is None else losses.masked_fill(mask == 0, 0.0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, mask: Tensor | None, z_loss: float, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.first_id, ctx.z_loss = _rank(group) * logits.shape[1], z_loss
        statistics = cross_entropy_statistics(logits, labels, mask, ctx.first_id)
        losses, log_z = cross_entropy_combine(_gathered(statistics, group), mask, z_loss)
        ctx.save_for_backward(logits, labels, mask, log_z)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, labels, mask, log_z = ctx.saved_tensors
        cross_entropy_backward(logits, gradient, labels, mask, log_z, ctx.first_id, ctx.z_loss)
        return logits, None, None, None, None


def _defined(
    logits: Tensor, labels: Tensor, mask: Tensor | None, z_loss: float, group: dist.ProcessGroup | None
) -> Tensor:
    """Return the definition over the logits of all ranks, in FP32 at least. Collective over `group`."""
    own = wide(logits)
    whole = own if group is None or group.size() == 1 else _WholeVocabulary.apply(own, group)
    return cross_entropy_reference(whole, labels=labels, mask=mask, z_loss=z_loss)


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
    if form() == "reference":
        summed = wide(weight)  # sums of chunks are not rounded

        def part_of(part: Tensor, own: slice) -> Tensor:
            logits = part @ summed.to(weight.dtype).t()
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
            cross_entropy_statistics(part @ weight.t(), labels[own], _part(mask, own), ctx.first_id)
            for part, own in _chunks(hidden, chunk_tokens)
        ]
        losses, log_z = cross_entropy_combine(_gathered(torch.cat(statistics, dim=1), group), mask, z_loss)
        ctx.save_for_backward(hidden, weight, labels, mask, log_z)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        hidden, weight, labels, mask, log_z = ctx.saved_tensors
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=log_z.dtype)  # sums of chunks are not rounded
        for part, own in _chunks(hidden, ctx.chunk_tokens):
            logits = part @ weight.t()  # (chunk_tokens, vocab/tp)
            cross_entropy_backward(
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
    # gloo wants the ranks in one dimension.
    dist.all_gather_into_tensor(everyone.flatten(0, 1), statistics, group=group)
    return everyone


def _statistics_in_torch(logits: Tensor, labels: Tensor, mask: Tensor | None, first_id: int) -> Tensor:
    local = labels - first_id
    elsewhere = (local < 0) | (local >= logits.shape[1])
    label_logit = wide(logits.gather(-1, local.masked_fill(elsewhere, 0).unsqueeze(-1)).squeeze(-1))
    highest, sums = torch.empty_like(label_logit), torch.empty_like(label_logit)
    for own in _row_blocks(logits):
        torch.amax(wide(logits[own]), dim=-1, out=highest[own])
        torch.sum((logits[own] - highest[own].unsqueeze(-1)).exp_(), dim=-1, out=sums[own])
    statistics = torch.stack([highest, sums, label_logit.masked_fill(elsewhere, 0.0)])
    if mask is None:
        return statistics
    return torch.where(mask == 0, statistics.new_tensor([[0.0], [1.0], [0.0]]), statistics)


def _combine_in_torch(all_statistics: Tensor, mask: Tensor | None, z_loss: float) -> tuple[Tensor, Tensor]:
    maxima, sums, label_logits = all_statistics.unbind(dim=1)
    highest = maxima.amax(dim=0)
    log_sum = (sums * (maxima - highest).exp()).sum(dim=0).log()
    log_z = log_sum + highest
    losses = torch.stack([log_sum - (label_logits.sum(dim=0) - highest), z_loss * log_z.square()])
    return losses if mask is None else losses.masked_fill(mask == 0, 0.0), log_z


def _backward_in_torch(
    logits: Tensor,
    gradient: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    log_z: Tensor,
    first_id: int,
    z_loss: float,
) -> None:
    dead = None if mask is None or mask.all() else mask == 0
    if dead is not None:
        gradient = gradient.masked_fill(dead, 0.0)
    scale = gradient[0] + gradient[1] * (2.0 * z_loss) * log_z
    local = labels - first_id
    elsewhere = ((local < 0) | (local >= logits.shape[1])).unsqueeze(-1)
    local = local.unsqueeze(-1).masked_fill(elsewhere, 0)
    label_gradient = -gradient[0].unsqueeze(-1).masked_fill(elsewhere, 0.0)
    in_place = logits.dtype == log_z.dtype
    for own in _row_blocks(logits):
        block = logits[own].sub_(log_z[own].unsqueeze(-1)) if in_place else logits[own] - log_z[own].unsqueeze(-1)
        block.exp_().mul_(scale[own].unsqueeze(-1))
        if dead is not None:
            block.masked_fill_(dead[own].unsqueeze(-1), 0.0)  # their logits may be anything
        block.scatter_add_(-1, local[own], label_gradient[own])
        if not in_place:
            logits[own] = block


def _row_blocks(logits: Tensor) -> list[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, logits.shape[1]))
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]


@operator("cross_entropy_statistics", in_torch=_statistics_in_torch)
def cross_entropy_statistics(logits: Tensor, labels: Tensor, mask: Tensor | None, first_id: int) -> Tensor:
    """Return (3, num_tokens) float32: the greatest logit, the sum of exp(logit - greatest), the label's logit or 0."""
    assert logits.is_contiguous()
    statistics = native.empty_fp32(3, logits.shape[0], like=logits)
    native.run(
        *("cross_entropy_statistics", native.is_bf16(logits), *logits.shape, first_id, logits, labels.contiguous()),
        *(mask, statistics),
    )
    return statistics


@operator("cross_entropy_combine", in_torch=_combine_in_torch)
def cross_entropy_combine(all_statistics: Tensor, mask: Tensor | None, z_loss: float) -> tuple[Tensor, Tensor]:
    """Return (losses (2, num_tokens), log_z (num_tokens,)) from the statistics of every rank, (tp, 3, num_tokens)."""
    parts, _, rows = all_statistics.shape
    losses, log_z = (native.empty_fp32(*shape, like=all_statistics) for shape in ((2, rows), (rows,)))
    native.run("cross_entropy_combine", rows, parts, float(z_loss), all_statistics.contiguous(), mask, losses, log_z)
    return losses, log_z


@operator("cross_entropy_backward", in_torch=_backward_in_torch, mutates=("logits",))
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
    native.run(
        *("cross_entropy_backward", native.is_bf16(logits), *logits.shape, first_id, float(z_loss)),
        *(gradient.contiguous(), labels.contiguous(), mask, log_z, logits),
    )


@cross_entropy_statistics.register_fake
def _(logits: Tensor, labels: Tensor, mask: Tensor | None, first_id: int) -> Tensor:
    return logits.new_empty(3, logits.shape[0], dtype=accumulated(logits))


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


def examples(draw: Draw) -> Iterator[Example]:
    """Yield a call that the check at start-up makes."""
    hidden, weight = draw(24, 16), draw(40, 16)
    labels = torch.arange(24, device=hidden.device)
    mask = (labels % 5 != 1).float()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        operands = {"labels": labels, "mask": mask, "z_loss": 1e-2, "group": None}
        return vocab_parallel_cross_entropy(hidden @ weight.t(), **operands)

    yield loss, [hidden, weight]
