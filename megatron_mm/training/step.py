"""One optimizer step, and one pass over micro-batches without it."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_mm.batch import MicroBatch
from megatron_mm.modality import Source
from megatron_mm.model.loss import sum_and_count
from megatron_mm.parallel import device
from megatron_mm.training.optimizer import clip_gradients
from megatron_mm.training.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on every rank."""

    losses: Tensor
    """(num_sources, 2) float64: loss sum and loss-bearing tokens of the global batch, by source."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    updated: bool
    """Whether the weights were changed: not if the gradient was not finite."""
    not_finite: tuple[str, ...] = ()
    """If not: 'rank R: NAME' of each gradient that was not finite before the sum over ranks."""


def train_step(state: TrainState, micro_batches: list[MicroBatch]) -> StepResult:
    """Do one optimizer step over the micro-batches of this rank. Collective over all ranks.

    A loss or gradient that is not finite leaves weights and optimizer state as they are: megatron-core 0.19.2 would
    apply it.
    """
    for model in state.models:
        model.train()
        model.zero_grad_buffer()
    state.optimizer.zero_grad()
    losses = run_micro_batches(state, micro_batches, forward_only=False)
    state.scheduler.step(1)
    grad_norm, updated = update(state, finite_loss=bool(torch.isfinite(losses).all()))
    state.step += 1
    lr = next(group["lr"] for group in state.optimizer.param_groups if group["default_config"])
    not_finite = () if updated else tuple(state.own_gradients.not_finite(state.mesh))
    return StepResult(losses, grad_norm, lr, updated, not_finite)


def update(state: TrainState, *, finite_loss: bool = True) -> tuple[float, bool]:
    """Clip and apply the gradients if they and the loss are finite; return (their norm, whether they were applied).

    Collective over all ranks.
    """
    optimizer, clip_grad = state.optimizer, state.config.optimizer.clip_grad
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not (isfinite(grad_norm) and finite_loss):
        return grad_norm, False
    if 0.0 < clip_grad < grad_norm:
        clip_gradients(optimizer, clip_grad / grad_norm)
    return grad_norm, optimizer.step_with_ready_grads()


def run_micro_batches(state: TrainState, micro_batches: list[MicroBatch], *, forward_only: bool) -> Tensor:
    """Run all micro-batches through the pipeline and return their losses: (num_sources, 2) float64 sums and counts.

    Collective over all ranks; the result is that of the global batch on every one of them.
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
    losses = torch.zeros(len(Source), 2, dtype=torch.float64, device=place)
    if state.mesh.computes_loss:
        losses += sum(report["losses"] for report in reports)
    dist.all_reduce(losses)
    return losses


def _forward_step(micro_batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, functools.partial]:
    micro_batch = next(micro_batches)
    return model(micro_batch), functools.partial(_loss, micro_batch=micro_batch)


def _loss(losses: Tensor, *, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return what megatron-core's schedules expect of a loss that is normalised once by the global count."""
    loss_sum, count, by_source = sum_and_count(losses, micro_batch=micro_batch)
    return loss_sum, count, {"losses": by_source}
