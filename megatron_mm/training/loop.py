"""The training loop."""

import logging
import time

import torch.distributed as dist

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.data.loader import Loader, Prefetcher
from megatron_mm.errors import ConfigError
from megatron_mm.kernels import ops
from megatron_mm.model.backend import choose
from megatron_mm.parallel import device
from megatron_mm.parallel.mesh import Mesh
from megatron_mm.training import checkpoint
from megatron_mm.training.evaluate import evaluate
from megatron_mm.training.guard import Guard
from megatron_mm.training.metrics import Metrics
from megatron_mm.training.replicas import check_replicas
from megatron_mm.training.report import plot_losses
from megatron_mm.training.start import start
from megatron_mm.training.state import TrainState, build_state, total_parameters
from megatron_mm.training.step import train_step

log = logging.getLogger(__name__)


def train(config: Config, mesh: Mesh) -> TrainState:
    """Train to the last step, from the newest checkpoint if there is one. Collective over all ranks."""
    kernels, backend = ops.select(config.training.kernels, device.current()), choose(config)
    loader = Loader(config.data.train, config=config, mesh=mesh, changes=config.data.changes)
    heldout = Loader(config.data.validation, config=config, mesh=mesh) if config.data.validation else None
    state = build_state(config, mesh)
    _resume(state)
    parameters = total_parameters(state)
    _announce(state, loader, f"{kernels} kernels | {backend.name} layers | {backend.attention} attention", parameters)
    guard = Guard()
    with Metrics(config, mesh, first_step=state.step) as metrics:
        metrics.start(step=state.step, layout=mesh.describe(), parameters=parameters)
        if heldout is not None and state.step == 0 and config.evaluation.interval:
            metrics.evaluation(evaluate(state, heldout), step=0)
        steps = range(state.step, config.last_step)
        for micro_batches in Prefetcher(loader, steps=steps, ahead=config.data.prefetch_steps):
            started = time.perf_counter()
            result = train_step(state, micro_batches)
            metrics.step(result, step=state.step, seconds=time.perf_counter() - started)
            guard.check(result, step=state.step)
            if _is_due(state, config.training.check_replicas_interval):
                check_replicas(state)
            if heldout is not None and _is_due(state, config.evaluation.interval):
                metrics.evaluation(evaluate(state, heldout), step=state.step)
            if _is_due(state, config.checkpoint.interval):
                checkpoint.save(state)
    if mesh.speaks:
        log.info("plot %s", plot_losses(config.run_dir))
    return state


def _is_due(state: TrainState, interval: int) -> bool:
    return bool(interval) and (state.step % interval == 0 or state.step == state.config.last_step)


def _resume(state: TrainState) -> None:
    """Load the newest checkpoint of the run, if there is one and it is wanted; otherwise start a new run."""
    path = checkpoint.newest(state.config)
    dist.barrier()  # all have looked before any may write
    if path is None:
        start(state)
        return
    if not state.config.checkpoint.resume:
        raise ConfigError(
            f"checkpoint.resume=false, but run_dir={state.config.run_dir} holds {path.name}. Use another run_dir, or "
            "remove that one."
        )
    checkpoint.load(state, path)


def _announce(state: TrainState, loader: Loader, chosen: str, parameters: int) -> None:
    """Say once what runs: settings, layout, model, data; save the settings."""
    if not state.mesh.speaks:
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
    for line in loader.describe():
        log.info("data %s", line)
    log.info("%d tokens a step", config.tokens_per_step)
    log.info("start at step %d of %d", state.step, config.training.steps)
