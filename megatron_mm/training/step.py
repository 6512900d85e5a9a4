"""One optimizer step, and one pass over micro-batches without it."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_mm.batch import MicroBatch, TokenCounts
from megatron_mm.engine import device
from megatron_mm.model.loss import sum_and_count
from megatron_mm.source import Source
from megatron_mm.training.optimizer import clip_gradients, leave_out
from megatron_mm.training.state import ModelState, TrainState


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on every rank."""

    losses: Tensor
    """(num_datasets, num_sources, 2) float64: loss sum and loss-bearing tokens of the global batch, by origin."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    updated: bool
    """Whether the weights were changed: not if the gradient was not finite, nor without a loss-bearing token."""
    not_finite: tuple[str, ...] = ()
    """'rank R: NAME' of each gradient that was not finite before the sum over ranks, if that of the step is not."""
    counts: TokenCounts = field(default_factory=TokenCounts)
    """What the positions of the global batch hold."""

    @property
    def bears_loss(self) -> bool:
        """Whether the global batch has a loss-bearing token: without one there is no loss, and nothing to learn."""
        return bool(self.losses[..., 1].sum() > 0)


class Totals(NamedTuple):
    """What the micro-batches of all ranks amount to; the same on every rank, on the host."""

    losses: Tensor
    """(num_datasets, num_sources, 2) float64 sums and counts."""
    counts: TokenCounts


def train_step(state: TrainState, micro_batches: list[MicroBatch]) -> StepResult:
    """Do one optimizer step over the micro-batches of this rank. Collective over all ranks.

    A loss or gradient that is not finite leaves weights and optimizer state as they are: megatron-core 0.19.2 would
    apply it. So does a global batch without a loss-bearing token, whose gradient of nothing would decay the weights.
    The encoder and projector of a modality that the global batch has nothing of stay as they are, for the same reason.
    """
    for model in state.models:
        model.train()
        model.zero_grad_buffer()
    state.optimizer.zero_grad()
    losses, counts = run_micro_batches(state, micro_batches, forward_only=False)
    state.scheduler.step(1)
    finite_loss = bool(torch.isfinite(losses).all())
    grad_norm, updated = update(state, finite_loss=finite_loss, counts=counts)
    state.step += 1
    lr = next(group["lr"] for group in state.optimizer.param_groups if group["default_config"])
    is_finite = finite_loss and isfinite(grad_norm)
    not_finite = () if is_finite else tuple(state.own_gradients.not_finite(state.mesh))
    return StepResult(losses, grad_norm, lr, updated, not_finite, counts)


def update(state: TrainState, *, finite_loss: bool = True, counts: TokenCounts | None = None) -> tuple[float, bool]:
    """Clip and apply the gradients if they and the loss are finite; return (their norm, whether they were applied).

    `counts`, of the global batch, say whether there is anything to learn and which modalities are to be left as they
    are; without them all is updated. Collective over all ranks.
    """
    optimizer, clip_grad = state.optimizer, state.config.optimizer.clip_grad
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not (isfinite(grad_norm) and finite_loss) or (counts is not None and not counts.loss):
        return grad_norm, False
    if counts is not None:
        leave_out(optimizer, _unused(state, counts))
    if 0.0 < clip_grad < grad_norm:
        clip_gradients(optimizer, clip_grad / grad_norm)
    return grad_norm, optimizer.step_with_ready_grads()


def _unused(state: TrainState, counts: TokenCounts) -> Iterator[Tensor]:
    """Yield this rank's parameters of encoders and projectors that nothing in the global batch went through."""
    for embedding in (chunk.embedding for chunk in state.chunks if chunk.pre_process):
        for name, part in embedding.media.items():
            if not counts.media[name]:
                yield from part.parameters()


def run_micro_batches(state: ModelState, micro_batches: list[MicroBatch], *, forward_only: bool) -> Totals:
    """Run all micro-batches through the pipeline and return what they amount to over all ranks.

    Collective over all ranks.
    """
    place = device.current()
    placed = [micro_batch.to(place) for micro_batch in micro_batches]
    iterators = [iter(placed) for _ in state.models]
    interleaved = state.mesh.vpp_size > 1
    reports = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=state.models if interleaved else state.models[0],
        num_microbatches=len(placed),
        seq_length=state.config.tokens_per_micro_batch,
        micro_batch_size=1,  # samples lie end to end: megatron-core sees one long sequence
        forward_only=forward_only,
    )
    num_datasets, num_counts = micro_batches[0].num_datasets, len(TokenCounts.names())
    totals = torch.zeros(num_datasets * len(Source) * 2 + num_counts, dtype=torch.float64, device=place)
    if state.mesh.computes_loss:
        counts = sum((micro_batch.counts for micro_batch in micro_batches), TokenCounts())
        totals[:-num_counts] += sum(report["losses"] for report in reports).flatten()
        totals[-num_counts:] += torch.tensor(counts.numbers, dtype=torch.float64).to(place)
    dist.all_reduce(totals)  # counts too: float64 is exact up to 2^53
    totals = totals.cpu()
    counts = TokenCounts.of(totals[-num_counts:].tolist())
    return Totals(totals[:-num_counts].view(num_datasets, len(Source), 2), counts)


def _forward_step(micro_batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, functools.partial]:
    micro_batch = next(micro_batches)
    return model(micro_batch), functools.partial(_loss, micro_batch=micro_batch)


def _loss(losses: Tensor, *, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return what megatron-core's schedules expect of a loss that is normalised once by the global count."""
    loss_sum, count, by_origin = sum_and_count(losses, micro_batch=micro_batch)
    return loss_sum, count, {"losses": by_origin}
