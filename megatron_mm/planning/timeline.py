"""The pipeline schedule of a layout over time: what each stage runs when, and how long it waits.

The order is megatron-core's own (its schedule table and warm-up counts), so interleaved schedules are shown as they
run; times are those of `cost`, passed through the dependencies of pipeline parallelism.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from megatron_mm.planning.cost import Efficiency, Gpu, Layout, Shape, head_seconds, layer_seconds, send_seconds


@dataclass(frozen=True)
class Pass:
    """One model chunk of one stage on one micro-batch."""

    stage: int
    chunk: int
    micro_batch: int
    backward: bool
    start: float
    """Seconds from the start of the step."""
    end: float


@dataclass(frozen=True)
class Durations:
    """Seconds of each pass."""

    forward: list[list[float]]
    """The seconds of each pass, by stage and chunk."""
    backward: list[list[float]]
    send: float
    """The seconds that activations, or their gradients, take from one stage to the next."""


@dataclass(frozen=True)
class _Stage:
    """What megatron-core's schedules ask a pipeline communicator for."""

    stage: int
    pp: int
    virtual_pipeline_model_parallel_size: int | None

    @property
    def pp_group(self) -> "_Stage":
        return self

    def rank(self) -> int:
        return self.stage

    def size(self) -> int:
        return self.pp


def order(*, pp: int, vpp: int, num_micro_batches: int, stage: int) -> list[tuple[bool, int, int]]:
    """Return (backward, chunk, micro-batch) of the passes of a stage in the order in which megatron-core runs them."""
    if pp == 1:
        return [(backward, 0, number) for number in range(num_micro_batches) for backward in (False, True)]
    table = get_schedule_table(num_micro_batches, vpp, pp) if vpp > 1 else [(n, 0) for n in range(num_micro_batches)]
    forward = [(False, chunk, micro_batch) for micro_batch, chunk in table]
    backward = [(True, vpp - 1 - chunk, micro_batch) for micro_batch, chunk in table]
    communicator = _Stage(stage, pp, vpp if vpp > 1 else None)
    _, _, warm_up, steady = get_pp_rank_microbatches(num_micro_batches, vpp, pp, p2p_communicator=communicator)
    pairs = [one for pair in zip(forward[warm_up:], backward) for one in pair]
    return forward[:warm_up] + pairs + backward[steady:]


def schedule(durations: Durations, *, num_micro_batches: int) -> list[Pass]:
    """Return every pass of a step with its times: each starts when its stage is free and what it needs has arrived."""
    pp, vpp = len(durations.forward), len(durations.forward[0])
    queues = [deque(order(pp=pp, vpp=vpp, num_micro_batches=num_micro_batches, stage=stage)) for stage in range(pp)]
    free, done, passes = [0.0] * pp, dict[tuple[bool, int, int], float](), []
    while any(queues):
        waiting = len(passes)
        for stage, queue in enumerate(queues):
            while queue:
                backward, chunk, micro_batch = queue[0]
                place = chunk * pp + stage  # of all chunks, in the order of the layers
                before = _before(backward, place, last=pp * vpp - 1)
                if before is not None and (*before, micro_batch) not in done:
                    break
                arrived = 0.0 if before is None else done[(*before, micro_batch)]
                if before is not None and before[1] != place:
                    arrived += durations.send
                seconds = (durations.backward if backward else durations.forward)[stage][chunk]
                start = max(free[stage], arrived)
                free[stage] = done[backward, place, micro_batch] = start + seconds
                passes.append(Pass(stage, chunk, micro_batch, backward, start, start + seconds))
                queue.popleft()
        assert len(passes) > waiting, "the schedule waits for itself"
    return passes


def _before(backward: bool, place: int, *, last: int) -> tuple[bool, int] | None:
    """Return which pass of the same micro-batch must be done before this one: (backward, place of its chunk)."""
    if not backward:
        return None if place == 0 else (False, place - 1)
    return (False, last) if place == last else (True, place + 1)


def waiting(passes: Sequence[Pass]) -> list[float]:
    """Return the share of the step that each stage waits."""
    seconds = max(one.end for one in passes)
    worked = [0.0] * (1 + max(one.stage for one in passes))
    for one in passes:
        worked[one.stage] += one.end - one.start
    return [1.0 - work / seconds for work in worked]


def bubble(passes: Sequence[Pass]) -> float:
    """Return the time that stages wait as a fraction of the time that they work (Narayanan et al. 2021)."""
    waits = sum(waiting(passes))
    return waits / (1 + max(one.stage for one in passes) - waits)


def durations_of(
    shape: Shape, layout: Layout, gpu: Gpu, rate: Efficiency, *, embedding_slot: bool, loss_slot: bool
) -> Durations:
    """Return the seconds of the passes of a layout; the slots of embedding and loss hold no layer, but the head."""
    chunks = layout.pp * layout.vpp
    layers = [(shape.num_layers + embedding_slot + loss_slot) / chunks] * chunks
    layers[0] -= embedding_slot
    layers[-1] -= loss_slot
    head = head_seconds(shape, layout, gpu, rate)
    found = []
    for backward in (False, True):
        a_layer = sum(layer_seconds(shape, layout, gpu, rate, backward=backward))
        seconds = [count * a_layer for count in layers]
        seconds[-1] += head[backward]
        found.append([seconds[stage :: layout.pp] for stage in range(layout.pp)])
    return Durations(*found, send=send_seconds(shape, layout, gpu, rate) if layout.pp > 1 else 0.0)
