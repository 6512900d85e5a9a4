"""The checkpoints of a run: what of it they hold, and going on from them, in the same layout or another.

A checkpoint is a folder run_dir/checkpoints/step_N of megatron-core's global tensors and the resolved configuration;
the package `checkpoint` says what makes it one, and how it is written and read.
"""

import functools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_mm import config as configs
from megatron_mm.checkpoint.format import (
    TOKENIZER,
    Fence,
    name_of,
    read_manifest,
    set_aside,
    step_of,
    unfinished_ones,
    whole_ones,
)
from megatron_mm.checkpoint.load import find_damage_together, load_sharded
from megatron_mm.checkpoint.optimizer_shards import LOADED_AS, describe_shards
from megatron_mm.checkpoint.save import Saved, SaveFailed, Saver
from megatron_mm.config import Config
from megatron_mm.data.consumption import Consumption, LeftOut
from megatron_mm.engine.agreement import together
from megatron_mm.engine.mesh import Mesh
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.shards import stored_tokenizer
from megatron_mm.storage import give_name, make_folder, replacing
from megatron_mm.training.metrics import run_of_metrics
from megatron_mm.training.optimizer import build_scheduler, load_optimizer
from megatron_mm.training.state import TrainState, settle_parameters
from megatron_mm.training.watch import forget_heartbeats

log = logging.getLogger(__name__)

VISIBLE_SECONDS = 90.0
"""How long another node may not see a new file: NFS keeps for up to a minute that there was none."""


def folder(config: Config) -> Path:
    """Return where the checkpoints of a run are."""
    return Path(config.run_dir) / "checkpoints"


def newest(config: Config) -> Path | None:
    """Return the newest committed checkpoint of a run, None if it has none."""
    return next(reversed(whole_ones(folder(config))), None)


def make_saver(state: TrainState, fence: Fence | None = None) -> Saver:
    """Return what saves the run of `state`, to be used for all of its saves."""
    settings = state.config.checkpoint
    return Saver(folder(state.config), state.mesh, fence, keep=settings.keep, keep_every=settings.keep_every)


def take_over(config: Config, mesh: Mesh) -> Fence:
    """Make this job the owner of a run, from whatever job wrote it before. Collective over all ranks.

    Raises ConfigError if the run_dir cannot be written, or is another folder on some ranks.
    """
    taken: list[Fence | str] = [""]
    if mesh.is_rank_0:
        try:
            taken = [Fence.take(folder(config))]
            forget_heartbeats(config.run_dir)
        except OSError as error:
            taken = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(taken, src=0)
    if isinstance(taken[0], str):
        raise ConfigError(f"run_dir={config.run_dir} cannot be written: {taken[0]}. Give one that can.")
    fence = taken[0]
    together(lambda: _check_shared(config, fence))
    return fence


def _check_shared(config: Config, fence: Fence) -> None:
    """Pass once this rank sees what rank 0 has written to the run_dir; a network's file system may need a while."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not fence.holds(folder(config)):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run_dir={config.run_dir}, here {folder(config).parent.absolute()}, is not the folder that rank 0 "
                "writes to: a checkpoint needs the files of all ranks in one place. Give an absolute path on a file "
                "system that all nodes share."
            )
        time.sleep(0.2)


def begin_save(state: TrainState, saver: Saver) -> Saved | None:
    """Start to save `state` in the background; return the save before if it had to be waited for.

    With checkpoint.background=false, return only when it is saved. Collective over all ranks.
    """
    settle_parameters(state)
    metadata = _metadata(state)
    content = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
    before = saver.begin(
        state.step,
        lambda: _sharded_state(state, metadata),
        metadata=content,
        facts=facts_of(state),
        texts={
            "config.yaml": configs.to_yaml(configs.anchor(state.config)),
            **(_tokenizer(state.config) if state.mesh.is_rank_0 else {}),
        },
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
    path = folder(state.config) / name_of(state.step)
    if saver.failed:
        raise SaveFailed(f"{path} was not saved")
    return path


def resume(state: TrainState) -> Path | None:
    """Bring `state` to the newest checkpoint that is whole, and return its folder; None if the run has none at all.

    A damaged one is named with what is wrong with it, and set aside. Collective over all ranks.
    Raises DataError if there are only damaged ones: to start anew instead would lose the run in silence.
    """
    own = folder(state.config)
    paths = sorted([*whole_ones(own), *unfinished_ones(own)], key=step_of)
    dist.barrier()  # all have looked before any may write
    for path in reversed(paths):
        problems = find_damage_together(state.mesh, path)
        if not problems:
            load(state, path, verify=False)
            return path
        if state.mesh.is_rank_0:
            aside = set_aside(path, "damaged")
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


def load(state: TrainState, path: Path, *, verify: bool = True) -> None:
    """Bring `state`, in whatever layout, to what was saved at `path`. Collective over all ranks.

    Settings are those of `state`, the optimizer's too: what the checkpoint has of them does not come back. Raises
    DataError if a file is missing, cut short or has other bytes than were written, ConfigError if a setting that must
    not change has changed.
    """
    problems = find_damage_together(state.mesh, path) if verify else []
    if problems:
        raise DataError("the checkpoint is damaged:\n  " + "\n  ".join(problems))
    facts = read_manifest(path)
    saved = configs.load_saved(path / "config.yaml")
    changed = configs.check_resume(saved, state.config, step=int(facts["step"]), source=str(path))
    metadata = _metadata(state)
    described = _sharded_state(state, metadata)
    loaded = load_sharded(described, path, strict=StrictHandling.RAISE_ALL)
    for chunk, key in zip(state.chunks, _chunk_keys(state)):
        chunk.load_state_dict(loaded[key])
    load_optimizer(state.optimizer, loaded["optimizer"], described=described["optimizer"])
    take_facts(state, path, facts, changed)
    state.scheduler = build_scheduler(state.config, state.optimizer, step=state.step)


def facts_of(state: TrainState) -> dict[str, Any]:
    """Return what a manifest records of a run beside its files."""
    consumption = state.consumption
    return {
        "run": state.run,
        "batch_sizes": consumption.batch_sizes,
        "left_out": [astuple(part) for part in consumption.left_out],
        "changes": state.changes,
        "lives": state.lives,
        "inputs": None if state.inputs is None else state.inputs.as_json(),
    }


def take_facts(state: TrainState, path: Path, facts: dict[str, Any], changed: dict[str, str]) -> None:
    """Let `state` know what the run has done, and record what is different from now on. Collective over all ranks."""
    state.step, state.run = int(facts["step"]), facts.get("run", "")
    consumed = [consumption_of(state.config, path) if state.mesh.is_rank_0 else None]
    dist.broadcast_object_list(consumed, src=0)
    assert consumed[0] is not None
    state.consumption = consumed[0]
    state.lives = list(dict.fromkeys([*facts.get("lives", []), *state.lives[-1:]]))
    state.changes = [*facts.get("changes", []), *([{"step": state.step, "settings": changed}] if changed else [])]
    if state.mesh.is_rank_0:
        for line in changed.values():
            log.info("changed since the checkpoint: %s", line)


def consumption_of(config: Config, path: Path | None) -> Consumption:
    """Return what a run of `config` consumes that goes on from the checkpoint `path`, or starts anew without one.

    Raises DataError if the checkpoint is too old to tell, or left_out.json is damaged.
    """
    if path is None:
        return Consumption(((0, config.training.global_batch_size),))
    facts = read_manifest(path)
    if facts.get("skipped_batches"):
        raise DataError(
            f"{path} counts what it left out in batches, as an older version did. Go on with that version, or start "
            "anew from its weights with training.start_from."
        )
    saved = configs.load_saved(path / "config.yaml")
    sizes = facts.get("batch_sizes", [(0, saved.training.global_batch_size)])
    left_out = _read_left_out(config, run=facts.get("run", ""))
    if left_out is None:
        left_out = [LeftOut(*map(int, part)) for part in facts.get("left_out", [])]
    consumption = Consumption(tuple((int(step), int(size)) for step, size in sizes), tuple(left_out))
    return consumption.resize(config.training.global_batch_size, step=int(facts["step"]))


def leave_out(state: TrainState, left_out: Sequence[LeftOut]) -> None:
    """Let the run leave out these samples, and no others, also after a restart. Collective over all ranks."""
    state.consumption = replace(state.consumption, left_out=tuple(left_out))
    dist.barrier()  # all have read the file: a rank that loads late would take these for left out twice
    if state.mesh.is_rank_0:
        path = _left_out_file(state.config)
        parts = [astuple(part) for part in state.consumption.left_out]
        with replacing(path) as file:
            file.write(json.dumps({"run": state.run, "left_out": parts}).encode())
    dist.barrier()


def _left_out_file(config: Config) -> Path:
    """Return the file of what the run has left out: a crash before the next checkpoint must not forget it."""
    return Path(config.run_dir) / "left_out.json"


def _read_left_out(config: Config, *, run: str) -> list[LeftOut] | None:
    """Return what that file says of the run; None if there is none, or it is another run's.

    Raises DataError if it is damaged.
    """
    path = _left_out_file(config)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        owner, left_out = content["run"], [LeftOut(*map(int, part)) for part in content["left_out"]]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{path}, which says what the run has left out, cannot be read ({type(error).__name__}: {error}). Restore "
            "it; without it (move it away) the run leaves out what its checkpoint says, which may be less."
        ) from error
    if owner != run:
        log.warning("%s is of another run than the checkpoint, and is not heeded", path)
        return None
    return left_out


def set_former_run_aside(state: TrainState) -> None:
    """Move away what another run has left in run_dir; one rank calls it.

    A new run starts from nothing; one that goes on keeps what it wrote itself.
    """
    own = Path(state.config.run_dir)
    aside = own / f"former-{time.strftime('%Y%m%dT%H%M%S')}"
    names = ["metrics.jsonl", "left_out.json", "DONE", "tensorboard", "loss.png"]
    if state.step and run_of_metrics(own) in (None, state.run):
        return
    for name in names if not state.step else ["metrics.jsonl", "tensorboard"]:
        if (own / name).exists():
            make_folder(aside)
            give_name(own / name, aside / name)
            log.warning("run_dir holds %s of another run: it is now in %s", name, aside)


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


def _sharded_state(state: TrainState, metadata: dict[str, Any]) -> dict[str, Any]:
    chunks = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in zip(_chunk_keys(state), state.chunks)}
    model = chunks["model"] if len(chunks) == 1 else chunks
    return {**chunks, "optimizer": describe_shards(state.optimizer, model)}


def planned_bytes(state: TrainState) -> int:
    """Return the bytes of tensors that this rank writes of a checkpoint, as a save plans them.

    Parameters that data-parallel ranks hold alike are dealt out among them; of the optimizer each writes what it has.
    Collective over dp_cp.
    """
    described = _sharded_state(state, _metadata(state))
    optimizer = described.pop("optimizer")
    apply_factories(described)
    group = state.mesh.dp_cp_group
    distribution = determine_main_replica_uniform_distribution(described, group)
    distribute_main_replicas_with_precomputed_distribution(described, group, distribution)
    tensors = [part for part in nested_values([described, optimizer]) if isinstance(part, ShardedTensor)]
    return sum(part.data.nbytes for part in tensors if is_main_replica(part.replica_id))
