"""`--check`: everything that a start would check, on one CPU without a rank, and what the first batch looks like."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_mm import config as configs
from megatron_mm.checkpoint.format import step_of, whole_ones
from megatron_mm.config import Config
from megatron_mm.data.rendering import piece_of, render_text
from megatron_mm.data.samples import Samples
from megatron_mm.engine import mesh as meshes
from megatron_mm.errors import ConfigError
from megatron_mm.model.accounting import build_whole
from megatron_mm.model.multimodal import MultimodalModel
from megatron_mm.optimizers import MAIN_BYTES
from megatron_mm.shards.format import TOKENIZER_SUFFIX
from megatron_mm.tokenizer import TextTokenizer
from megatron_mm.training import checkpoints
from megatron_mm.training.preflight import Ready, check_run_dir, compare, examine, find_past

SHOWN_DOCUMENTS = 3
SHOWN_CHARACTERS = 300


def check(config: Config, world_size: int) -> Iterator[str]:
    """Yield a line for each thing that was checked, in the order of a start. Nothing is written.

    What only the ranks themselves can tell stays open, and is said: whether all nodes have the same software, files and
    run_dir, and what their GPUs can do. Raises ConfigError or DataError as a start would.
    """
    configs.check_world(config, world_size)
    dp_size = world_size // config.parallel.ranks_per_replica
    cut = config.parallel
    yield (
        f"layout      {world_size} ranks: TP{cut.tp} PP{cut.pp} VPP{cut.vpp} CP{cut.cp} DP{dp_size}; "
        f"{config.num_micro_batches(dp_size)} micro-batches a step, {config.tokens_per_step:,} positions a step"
    )
    check_run_dir(config)
    mesh = meshes.alone(config)
    model = build_whole(config, mesh)
    yield f"model       {sum(parameter.numel() for parameter in model.parameters()):,} parameters"
    past = find_past(config)
    ready = examine(config, mesh, past)
    if ready.goes_on_from is not None:
        ready = replace(ready, inputs=compare(ready, config, looks=True))
    samples = ready.loader.samples
    yield from (f"data        {line}" for line in samples.describe())
    yield from (f"held out    {line}" for line in (ready.heldout.samples.describe() if ready.heldout else ["nothing"]))
    yield from (f"contents    {name}: {value}" for name, value in ready.inputs.by_name().items())
    yield _start_line(config, ready)
    yield from _disk_lines(config, model)
    samples.follow(past.consumption)
    for name, epochs in samples.epochs(config.training.steps).items():
        yield f"epochs      {name}: read {epochs:,.2f} times by step {config.training.steps}"
    yield from _first_batch(samples, step=0 if ready.goes_on_from is None else step_of(ready.goes_on_from))
    yield "left open   software, files and run_dir on the other nodes, GPUs: the ranks compare those as they start"


def _start_line(config: Config, ready: Ready) -> str:
    if ready.goes_on_from is None:
        return f"start       a new run in {config.run_dir}, of {config.training.steps} steps"
    step = step_of(ready.goes_on_from)
    if step >= config.last_step:
        return f"start       nothing is left to do: step {step} of {config.last_step} is saved in {ready.goes_on_from}"
    return f"start       goes on from {ready.goes_on_from}, to step {config.last_step}"


def checkpoint_bytes(config: Config, model: MultimodalModel) -> int:
    """Return the bytes of one checkpoint: every weight, and of trained ones the optimizer's state."""
    weight, optimizer = 4 if config.training.precision == "fp32" else 2, config.optimizer
    return sum(
        parameter.numel() * (weight + (MAIN_BYTES + 4 * len(optimizer.rule_of(name, parameter).state)) * trained)
        for name, parameter in model.named_parameters()
        for trained in [parameter.requires_grad]
    )


def _disk_lines(config: Config, model: MultimodalModel) -> Iterator[str]:
    """Yield what checkpoints need and what the disk has. Raises ConfigError if not one fits."""
    if not config.checkpoint.interval:
        yield "checkpoints none: checkpoint.interval=0"
        return
    one = checkpoint_bytes(config, model)
    folder = checkpoints.folder(config).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free, kept = shutil.disk_usage(there).free, len(whole_ones(folder))
    more = max(1, config.checkpoint.keep + 1 - kept)  # one is written before the oldest goes
    if free < one:
        raise ConfigError(
            f"run_dir={config.run_dir}: a checkpoint takes {_size(one)}, and {there} has {_size(free)} free. Make "
            "room, or give a run_dir on another disk."
        )
    line = f"checkpoints {_size(one)} each, {kept} there, {more} more to come; {_size(free)} free in {there}"
    yield line if free >= more * one else f"{line}: TOO LITTLE for checkpoint.keep={config.checkpoint.keep}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _first_batch(samples: Samples, *, step: int) -> Iterator[str]:
    """Yield what the first sample of the next step holds, as the model will see it."""
    batch = samples.of_step(step)
    pieces = samples.pieces(int(batch[0]))
    yield f"first batch step {step + 1}: {len(batch)} samples, the first of {len(pieces)} documents:"
    stored = Path(samples.shards[0].prefix + TOKENIZER_SUFFIX)
    if not stored.exists():
        yield f"            which cannot be shown: {stored} is missing, and exports will lack it too"
        return
    tokenizer = TextTokenizer(stored)
    for piece in pieces[:SHOWN_DOCUMENTS]:
        text = " ".join(render_text(piece_of(samples.shards, piece), tokenizer).split())
        yield f"            {text[:SHOWN_CHARACTERS]}{' ...' * (len(text) > SHOWN_CHARACTERS)}"
