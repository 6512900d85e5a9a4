"""Saving a run and going on from it, in the same layout or another.

A checkpoint is a folder run_dir/checkpoints/step_N of megatron-core's global tensors and the resolved configuration;
manifest.py says what makes it one, saver.py how it is written.
"""

import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.hf.pickles import only_plain_pickles
from megatron_mm.parallel.mesh import Mesh
from megatron_mm.shards import stored_tokenizer
from megatron_mm.training import manifest
from megatron_mm.training.manifest import Fence
from megatron_mm.training.optimizer import build_scheduler
from megatron_mm.training.optimizer_shards import LOADED_AS, describe_shards
from megatron_mm.training.saver import Saved, SaveFailed, Saver
from megatron_mm.training.state import TrainState, settle_parameters

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
MAY_CHANGE = (
    *("preset", "run_dir", "parallel.", "checkpoint.", "evaluation.", "logging.", "schedule.", "guard."),
    *("training.start_from", "vision.pretrained", "audio.pretrained"),
    *("training.steps", "training.stop_after", "training.micro_batch_size", "training.recompute", "training.kernels"),
    *("training.backend", "training.attention", "training.check_replicas_interval"),
    *("data.validation", "data.prefetch_steps", "data.stall_seconds", "data.changes"),
)
"""Settings that a resumed run may have different from the one that was saved."""


def folder(config: Config) -> Path:
    """Return where the checkpoints of a run are."""
    return Path(config.run_dir) / "checkpoints"


def newest(config: Config) -> Path | None:
    """Return the newest committed checkpoint of a run, None if it has none."""
    return next(reversed(manifest.whole_ones(folder(config))), None)


def make_saver(state: TrainState, fence: Fence | None = None) -> Saver:
    """Return what saves the run of `state`, to be used for all of its saves."""
    settings = state.config.checkpoint
    return Saver(folder(state.config), state.mesh, fence, keep=settings.keep, keep_every=settings.keep_every)


def take_over(config: Config, mesh: Mesh) -> Fence:
    """Make this job the owner of a run, from whatever job wrote it before. Collective over all ranks.

    Raises ConfigError if the run_dir cannot be written.
    """
    taken: list[Fence | str] = [""]
    if mesh.speaks:
        try:
            taken = [Fence.take(folder(config))]
        except OSError as error:
            taken = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(taken, src=0)
    if isinstance(taken[0], str):
        raise ConfigError(f"run_dir={config.run_dir} cannot be written: {taken[0]}. Give one that can.")
    return taken[0]


def begin_save(state: TrainState, saver: Saver) -> Saved | None:
    """Start to save `state` in the background; return the save before if it had to be waited for.

    With checkpoint.background=false, return only when it is saved. Collective over all ranks.
    """
    settle_parameters(state)
    metadata = _metadata(state)
    content = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
    before = saver.begin(
        state.step,
        lambda: _sharded_state(state, metadata, loading=False),
        metadata=content,
        facts={"skipped_batches": state.skipped_batches},
        texts={"config.yaml": configs.to_yaml(state.config), **(_tokenizer(state.config) if state.mesh.speaks else {})},
    )
    return before if state.config.checkpoint.background else saver.finish()


@functools.lru_cache(maxsize=1)
def _read_tokenizer(prefix: str) -> str | None:
    try:
        content = stored_tokenizer(prefix)
    except (OSError, DataError) as error:
        log.warning("checkpoints are saved without a tokenizer: %s", error)
        return None
    return None if content is None else content.decode()


def _tokenizer(config: Config) -> dict[str, str]:
    """Return the tokenizer.json of the run's shards by its name in a checkpoint; nothing if they have none."""
    content = _read_tokenizer(config.data.train_datasets[0].split(",")[0])
    return {} if content is None else {TOKENIZER: content}


def save(state: TrainState) -> Path:
    """Save `state`, wait for it and return the folder. Collective over all ranks. Raises SaveFailed."""
    saver = make_saver(state)
    begin_save(state, saver)
    saver.finish()
    path = folder(state.config) / f"step_{state.step:08d}"
    if saver.failed:
        raise SaveFailed(f"{path} was not saved")
    return path


def resume(state: TrainState) -> Path | None:
    """Bring `state` to the newest checkpoint that is whole, and return its folder; None if the run has none at all.

    A damaged one is named with what is wrong with it, and set aside. Collective over all ranks.
    Raises DataError if there are only damaged ones: to start anew instead would lose the run in silence.
    """
    paths = manifest.whole_ones(folder(state.config))
    dist.barrier()  # all have looked before any may write
    for path in reversed(paths):
        problems = find_damage(state.mesh, path)
        if not problems:
            load(state, path, verify=False)
            return path
        if state.mesh.speaks:
            aside = manifest.set_aside(path, "damaged")
            log.error("%s is damaged and is now %s; going on from the one before:", path.name, aside.name)
            for problem in problems:
                log.error("  %s", problem)
        dist.barrier()
    if paths:
        raise DataError(
            f"no checkpoint of {folder(state.config)} is whole: {', '.join(path.name for path in paths)} are damaged. "
            "Restore one (its name without .damaged), or give another run_dir to start anew."
        )
    return None


def find_damage(mesh: Mesh, path: Path) -> list[str]:
    """Return what is wrong with a checkpoint; each rank hashes its share of the files. Collective over all ranks."""
    everywhere: list[list[str]] = [[]] * mesh.world_size
    dist.all_gather_object(everywhere, manifest.find_damage(path, share=mesh.rank, of=mesh.world_size))
    return list(dict.fromkeys(line for lines in everywhere for line in lines))


def load(state: TrainState, path: Path, *, verify: bool = True) -> None:
    """Bring `state`, in whatever layout, to what was saved at `path`. Collective over all ranks.

    Raises DataError if a file is missing, cut short or has other bytes than were written, ConfigError if a setting that
    must not change has changed.
    """
    problems = find_damage(state.mesh, path) if verify else []
    if problems:
        raise DataError("the checkpoint is damaged:\n  " + "\n  ".join(problems))
    _check_settings(path, state.config)
    facts = manifest.read_manifest(path)
    metadata = _metadata(state)
    with only_plain_pickles(path):
        loaded = dist_checkpointing.load(
            _sharded_state(state, metadata, loading=True), str(path), strict=StrictHandling.RAISE_ALL
        )
    for chunk, key in zip(state.chunks, _chunk_keys(state)):
        chunk.load_state_dict(loaded[key])
    state.optimizer.load_state_dict(loaded["optimizer"])
    state.step = int(facts["step"])
    path = _skipped(state.config)
    skipped = json.loads(path.read_text()) if path.exists() else facts["skipped_batches"]
    state.skipped_batches = [(int(first), int(count)) for first, count in skipped]
    state.scheduler = build_scheduler(state.config, state.optimizer, step=state.step)


def skip_batches(state: TrainState, step: int, count: int) -> None:
    """Leave out `count` batches before step `step`, counted from 0, also after a restart. Collective over all ranks."""
    state.skipped_batches.append((step, count))
    dist.barrier()  # all have read the file: a rank that loads late would take these for skipped twice
    if state.mesh.speaks:
        path = _skipped(state.config)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(state.skipped_batches))
        os.replace(partial, path)
    dist.barrier()


def _skipped(config: Config) -> Path:
    """Return the file of the run's skipped batches: a crash before the next checkpoint must not forget them."""
    return Path(config.run_dir) / "skipped_batches.json"


def _chunk_keys(state: TrainState) -> list[str]:
    return ["model"] if len(state.chunks) == 1 else [f"model{number}" for number in range(len(state.chunks))]


def _metadata(state: TrainState) -> dict[str, Any]:
    """Return how megatron-core should lay out tensors: as whole ones that any layout can cut."""
    return {
        "distrib_optim_sharding_type": LOADED_AS,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": state.mesh.dp_cp_group,
    }


def _sharded_state(state: TrainState, metadata: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    chunks = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in zip(_chunk_keys(state), state.chunks)}
    model = chunks["model"] if len(chunks) == 1 else chunks
    if loading:
        optimizer = state.optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata)
    else:
        optimizer = describe_shards(state.optimizer, model)
    return {**chunks, "optimizer": optimizer}


def _check_settings(path: Path, config: Config) -> None:
    """Raise ConfigError if `config` would not go on with the run that was saved."""
    saved = configs.load(str(path / "config.yaml"))
    changed = configs.differences(saved, config)
    refused = [line for key, line in changed.items() if not key.startswith(MAY_CHANGE)]
    step = int(path.name.removeprefix("step_"))
    past = [[change for change in data.changes if change.from_step < step] for data in (saved.data, config.data)]
    if past[0] != past[1]:
        refused.append(f"{changed['data.changes']} (only changes from step {step} on can differ)")
    if refused:
        raise ConfigError(
            f"{path} was saved with other settings, which a resumed run cannot change:\n"
            + "\n".join(refused)
            + "\nSet them back, or start anew with another run_dir."
        )
    for line in changed.values():
        log.info("changed since the checkpoint: %s", line)


def planned_bytes(state: TrainState) -> int:
    """Return the bytes of tensors that this rank writes of a checkpoint, as a save plans them.

    Parameters that data-parallel ranks hold alike are dealt out among them; of the optimizer each writes what it has.
    Collective over dp_cp.
    """
    described = _sharded_state(state, _metadata(state), loading=False)
    optimizer = described.pop("optimizer")
    apply_factories(described)
    group = state.mesh.dp_cp_group
    distribution = determine_main_replica_uniform_distribution(described, group)
    distribute_main_replicas_with_precomputed_distribution(described, group, distribution)
    tensors = [part for part in nested_values([described, optimizer]) if isinstance(part, ShardedTensor)]
    return sum(part.data.nbytes for part in tensors if is_main_replica(part.replica_id))
