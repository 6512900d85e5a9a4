"""The training loop."""

import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_mm import config as configs
from megatron_mm import endings
from megatron_mm.batch import MicroBatch
from megatron_mm.checkpoint.copies import Copies
from megatron_mm.checkpoint.format import step_of
from megatron_mm.checkpoint.save import Saved, Saver
from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.data.prefetch import Prefetcher
from megatron_mm.engine import device
from megatron_mm.engine.mesh import Mesh
from megatron_mm.kernels.select import select
from megatron_mm.model.backend import choose
from megatron_mm.storage import remove_file, replacing
from megatron_mm.training import checkpoints
from megatron_mm.training.copies import begin_copy, make_copies, restore
from megatron_mm.training.evaluate import evaluate
from megatron_mm.training.guard import BadSteps, Guard, LossSpike
from megatron_mm.training.initial_weights import begin_anew, load_initial_weights
from megatron_mm.training.metrics import Metrics
from megatron_mm.training.preflight import Ready, prepare
from megatron_mm.training.replicas import check_replicas
from megatron_mm.training.report import plot_losses
from megatron_mm.training.state import TrainState, build_state, total_parameters
from megatron_mm.training.step import train_step
from megatron_mm.training.stop import StopRequest
from megatron_mm.training.watch import Watch

log = logging.getLogger(__name__)


@dataclass
class Run:
    """All that a step of the loop touches."""

    state: TrainState
    loader: Loader
    heldout: Loader | None
    metrics: Metrics
    guard: Guard
    saver: Saver
    copies: Copies | None
    watch: Watch
    stop: StopRequest


def train(config: Config, mesh: Mesh) -> TrainState:
    """Train to the last step, from the newest checkpoint if there is one. Collective over all ranks.

    Ends before, with a checkpoint, when it is asked to stop; with KeyboardInterrupt then, if Ctrl-C asked. Raises
    ConfigError or DataError, before anything is touched, for what does not fit; TrainingDiverged, ReplicasDiffer,
    SaveFailed or TakenOver when going on would do harm.
    """
    kernels, backend = select(config.training.kernels, device.current()), choose(config)
    computes = {"kernels": str(kernels), "layers": backend.name, "attention": backend.attention}
    ready = prepare(config, mesh, computes={**computes, "device": device.name()})
    fence = checkpoints.take_over(config, mesh)
    with Watch(config.guard, mesh, config.run_dir) as watch, StopRequest(mesh) as stop:
        state = build_state(config, mesh)
        state.inputs, state.lives = ready.inputs, [fence.token]
        saver, copies = checkpoints.make_saver(state, fence), make_copies(state, fence)
        _begin(state, ready, copies)
        parameters = total_parameters(state)
        chosen = f"{kernels} kernels | {backend.name} layers | {backend.attention} attention"
        _announce(state, ready.loader, chosen, parameters)
        with Metrics(config, mesh, first_step=state.step) as metrics:
            changed = [line for one in state.changes if one["step"] == state.step for line in one["settings"].values()]
            where = {"layout": mesh.describe(), "parameters": parameters, "run": state.run}
            metrics.start(step=state.step, **where, changed=changed)
            run = Run(state, ready.loader, ready.heldout, metrics, Guard(config.guard), saver, copies, watch, stop)
            run.guard.remember(metrics.losses(config.guard.spike_window))
            if state.step == 0 and config.evaluation.interval:
                _evaluate(run)
            with endings.gently(stop.interrupt):
                while not _train_on(run):
                    pass
        if copies is not None:
            copies.close()
        if stop.interrupted and state.step < config.last_step:
            raise KeyboardInterrupt
    if mesh.is_rank_0:
        _finish(state)
    return state


def done_marker(config: Config) -> Path:
    """Return the file that says that a run has done its steps, and that the weights after the last one are saved."""
    return Path(config.run_dir) / "DONE"


def _finish(state: TrainState) -> None:
    """Mark the run as done if its final weights are saved, and draw its losses."""
    newest = checkpoints.newest(state.config)
    if newest is not None and step_of(newest) == state.step >= state.config.last_step:
        with replacing(done_marker(state.config)) as file:
            file.write(f"{state.step}\n".encode())
    elif state.step >= state.config.last_step:
        log.warning("the weights after step %d, the last, are not saved: checkpoint.interval is 0", state.step)
    log.info("plot %s", plot_losses(state.config.run_dir))


def _train_on(run: Run) -> bool:
    """Train to the end, or to where the run has to go back; return whether that was the end."""
    state, watch = run.state, run.watch
    config, save_wanted, stopping = state.config, False, False
    run.loader.samples.follow(state.consumption)
    steps = range(state.step, config.last_step)
    ahead, stall_seconds = config.data.prefetch_steps, config.data.stall_seconds
    batches = iter(Prefetcher(run.loader, steps=steps, ahead=ahead, stall_seconds=stall_seconds))
    for _ in steps:
        micro_batches = _next(batches, run)
        watch.beat("step", step=state.step + 1)
        started = time.perf_counter()
        result = train_step(state, micro_batches)
        run.metrics.step(result, step=state.step, seconds=time.perf_counter() - started)
        watch.started()
        try:
            run.guard.check(result, step=state.step, since=state.last_shift())
        except LossSpike as spike:
            return _go_back(run, spike)
        _check_ranks(run)
        if _is_due(state, config.evaluation.interval):
            _evaluate(run)
        stopping |= run.stop.agreed()
        save_wanted |= bool(config.checkpoint.interval) and (stopping or _is_due(state, config.checkpoint.interval))
        if save_wanted and run.guard.healthy:
            watch.beat("save", step=state.step)
            _record(run, checkpoints.begin_save(state, run.saver))
            save_wanted = False
        elif run.copies is not None and run.guard.healthy and _is_due(state, config.checkpoint.memory_interval):
            begin_copy(state, run.copies)
        _record(run, run.saver.poll())
        _record_copy(run)
        if stopping and not save_wanted:
            break
    if (bad := run.guard.unsettled(state.step)) and (save_wanted or not stopping):
        return _go_back(run, bad)
    watch.beat("save", step=state.step)
    _record(run, run.saver.finish())
    run.saver.check_last()
    if state.mesh.is_rank_0 and state.step < config.last_step:
        log.info("stopped after step %d: %s", state.step, run.stop.reason() or "another rank was asked to")
    return True


def _next(batches: Iterator[list[MicroBatch]], run: Run) -> list[MicroBatch]:
    """Return the next micro-batches of this rank, and note how long it waited for them."""
    run.watch.beat("data", step=run.state.step + 1)
    started = time.perf_counter()
    micro_batches = next(batches)
    run.watch.waited_for_data(time.perf_counter() - started)
    return micro_batches


def _check_ranks(run: Run) -> None:
    """Compare what the ranks hold and how fast they are, where that is due."""
    config, state = run.state.config, run.state
    if _is_due(state, config.training.check_replicas_interval):
        run.watch.beat("replica check", step=state.step)
        check_replicas(state)
    if _is_due(state, config.guard.slow_rank_interval):
        run.metrics.event(run.watch.compare_ranks(step=state.step), step=state.step)


def _evaluate(run: Run) -> None:
    if run.heldout is None:
        return
    run.watch.beat("evaluation", step=run.state.step)
    run.metrics.evaluation(evaluate(run.state, run.heldout), step=run.state.step)


def _record(run: Run, saved: Saved | None) -> None:
    """Say what a save that is now committed has cost."""
    if saved is None:
        return
    values = {"save_stall_seconds": saved.stall_seconds, "save_seconds": saved.seconds, "saved_step": saved.step}
    values["read_back_seconds"] = saved.read_back_seconds
    run.metrics.event(values, step=run.state.step)
    if run.state.mesh.is_rank_0:
        log.info(
            "step %d | saved %s in %.2f s, read back in %.2f s, training stood still for %.2f s",
            *(saved.step, saved.path, saved.seconds, saved.read_back_seconds, saved.stall_seconds),
        )


def _record_copy(run: Run) -> None:
    """Let a copy in memory that all ranks have written count, and say what it has cost."""
    copied = None if run.copies is None else run.copies.poll()
    if copied is not None:
        values = {"copy_stall_seconds": copied.stall_seconds, "copy_seconds": copied.seconds}
        run.metrics.event({**values, "copied_step": copied.step}, step=run.state.step)


def _go_back(run: Run, bad: BadSteps) -> bool:
    """Bring the run to its last checkpoint, or to its start, and leave out the batches of the bad steps.

    Returns that the run is not over.
    """
    state = run.state
    run.guard.roll_back(bad)
    left_out = state.consumption.leave_out(range(bad.first - 1, bad.last)).left_out  # as these steps consumed them
    _record(run, run.saver.finish())
    if run.copies is not None:
        run.copies.drop()  # they may have learned from what is left out from now on
    path = checkpoints.resume(state)
    if path is None:
        begin_anew(state)
    checkpoints.leave_out(state, left_out)
    run.metrics.go_back(step=state.step, reason=str(bad))
    run.guard.remember(run.metrics.losses(state.config.guard.spike_window))
    if state.mesh.is_rank_0:
        where = path or "the initial weights, for nothing is saved yet"
        log.warning("%s: going back to %s, without the batches of these steps", bad, where)
    return False


def _is_due(state: TrainState, interval: int) -> bool:
    return bool(interval) and (state.step % interval == 0 or state.step == state.config.last_step)


def _begin(state: TrainState, ready: Ready, copies: Copies | None) -> None:
    """Go on from the newest whole checkpoint of the run, or a newer copy in memory; start a new run if it has none."""
    if ready.goes_on_from is not None:
        if copies is None or not restore(state, copies, newest=ready.goes_on_from):
            checkpoints.resume(state)
    else:
        names = [uuid.uuid4().hex[:16]]
        dist.broadcast_object_list(names, src=0)
        state.run = names[0]
        load_initial_weights(state)
    checkpoints.from_rank_0(state.mesh, lambda: checkpoints.set_former_run_aside(state))
    if state.mesh.is_rank_0 and state.step < state.config.last_step:
        remove_file(done_marker(state.config))


def _announce(state: TrainState, loader: Loader, chosen: str, parameters: int) -> None:
    """Say once what runs: settings, layout, model, data; save the settings."""
    if not state.mesh.is_rank_0:
        return
    config = state.config
    configs.save(config)
    for change in configs.changes(config):
        log.info("%s | %s", config.preset, change)
    log.info(
        "layout %s on %s | %s parameters | %s | %d micro-batches a step",
        state.mesh.describe(),
        device.current().type,
        f"{parameters:,}",
        chosen,
        config.num_micro_batches(state.mesh.dp_size),
    )
    for line in loader.samples.describe():
        log.info("data %s", line)
    log.info("%d positions a step, padding included", config.tokens_per_step)
    log.info("start at step %d of %d", state.step, config.training.steps)
