"""The checkpoints of a run: what of it they hold, and going on from them, in the same layout or another.

A checkpoint is a folder run_dir/checkpoints/step_N of megatron-core's global tensors and the resolved configuration;
the package `checkpoint` says what makes it one, and how it is written and read.
"""

import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
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
from megatron_mm.checkpoint import load as loading
from megatron_mm.checkpoint.format import (
    TOKENIZER,
    Fence,
    damaged_ones,
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
from megatron_mm.errors import ConfigError, DataError, is_passing
from megatron_mm.retry import retrying
from megatron_mm.shards import stored_tokenizer
from megatron_mm.storage import give_name, make_folder, replacing
from megatron_mm.training.metrics import run_of_metrics
from megatron_mm.training.optimizer import build_scheduler, load_optimizer
from megatron_mm.training.state import TrainState, settle_parameters
from megatron_mm.training.watch import forget_heartbeats

log = logging.getLogger(__name__)


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
    fence = from_rank_0(mesh, lambda: _take(config))
    together(lambda: _check_shared(config, fence))
    return fence


def _take(config: Config) -> Fence:
    try:
        fence = Fence.take(folder(config))
        forget_heartbeats(config.run_dir)
    except OSError as error:
        if is_passing(error):
            raise
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"run_dir={config.run_dir} cannot be written: {what}. Give one that can.") from error
    return fence


def from_rank_0[T](mesh: Mesh, action: Callable[[], T]) -> T:
    """Return on every rank what `action` returns on rank 0, which alone calls it; raise there what it raises.

    Ranks that looked at a run_dir by themselves would see it at different times. Collective over all ranks.
    """
    found = [together(lambda: action() if mesh.is_rank_0 else None)]
    dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


def _check_shared(config: Config, fence: Fence) -> None:
    """Pass once this rank sees what rank 0 has written to the run_dir; a network's file system may need a while."""
    deadline = time.monotonic() + loading.VISIBLE_SECONDS
    while True:
        refused: OSError | None = None
        try:
            if fence.holds(folder(config)):
                return
        except OSError as error:
            refused = error
        if time.monotonic() > deadline:
            if refused is not None:
                raise refused
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

    Rank 0 says which there are. Damaged ones are named with what is wrong with them, and set aside once an older one is
    known to be whole. Collective over all ranks. Raises DataError, at each try, if there are only damaged ones: to
    start anew instead would lose the run in silence; StorageFailed if one cannot be read, which is no damage.
    """
    mesh, own = state.mesh, folder(state.config)
    paths = from_rank_0(mesh, lambda: sorted([*whole_ones(own), *unfinished_ones(own)], key=step_of))
    before = from_rank_0(mesh, lambda: damaged_ones(own))
    damaged: dict[Path, list[str]] = {}
    for path in reversed(paths):
        problems = find_damage_together(mesh, path)
        if not problems:
            from_rank_0(mesh, lambda: _set_damaged_aside(damaged))
            load(state, path, verify=False)
            return path
        damaged[path] = problems
    if paths or before:
        raise no_whole_checkpoint(own, damaged, before)
    return None


def _set_damaged_aside(damaged: Mapping[Path, Sequence[str]]) -> None:
    for path, problems in damaged.items():
        aside = set_aside(path, "damaged")
        log.error("%s is damaged and is now %s; going on from the one before:", path.name, aside.name)
        for problem in problems:
            log.error("  %s", problem)


def no_whole_checkpoint(own: Path, damaged: Mapping[Path, Sequence[str]], before: Sequence[Path]) -> DataError:
    """Return the refusal of a run whose checkpoints are all `damaged`, or were set aside as such `before`."""
    reasons = "".join(f"\n  {line}" for found in damaged.values() for line in found)
    names = ", ".join(path.name for path in (*damaged, *before))
    return DataError(
        f"no checkpoint of {own} is whole: {names} are damaged.{reasons}\n  Restore one (its name without .damaged), "
        "or give another run_dir to start anew."
    )


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
    state.consumption = from_rank_0(state.mesh, lambda: consumption_of(state.config, path))
    state.lives = list(dict.fromkeys([*facts.get("lives", []), *state.lives[-1:]]))
    state.changes = [*facts.get("changes", []), *([{"step": state.step, "settings": changed}] if changed else [])]
    if state.mesh.is_rank_0:
        for line in changed.values():
            log.info("changed since the checkpoint: %s", line)


def consumption_of(config: Config, path: Path | None) -> Consumption:
    """Return what a run of `config` consumes that goes on from the checkpoint `path`, or starts anew without one.

    Of a left_out.json that is damaged the checkpoint's own list is in force, with a warning that says what it holds.
    Raises DataError if the checkpoint is too old to tell.
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
    stored = [LeftOut(*map(int, part)) for part in facts.get("left_out", [])]
    left_out = _read_left_out(config, run=facts.get("run", ""), stored=stored)
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


def _read_left_out(config: Config, *, run: str, stored: list[LeftOut]) -> list[LeftOut]:
    """Return what that file says of the run; what the checkpoint has `stored` if it says nothing, or is damaged."""
    path = _left_out_file(config)
    try:
        owner, left_out = _parse_left_out(path)
    except FileNotFoundError:
        return stored
    except DataError as error:
        parts = ", ".join(str(list(astuple(part))) for part in stored) or "nothing"
        log.warning("%s: as its checkpoint says, which may be less, the run leaves out %s", error, parts)
        return stored
    if owner != run:
        log.warning("%s is of another run than the checkpoint, and is not heeded", path)
        return stored
    return left_out


def _parse_left_out(path: Path) -> tuple[str, list[LeftOut]]:
    """Return the run of a left_out.json, and its parts. Raises DataError if it is damaged, FileNotFoundError."""
    try:
        content = json.loads(retrying(path.read_bytes, what=path))
        return str(content["run"]), [LeftOut(*map(int, part)) for part in content["left_out"]]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{path}, which says what the run has left out, is damaged ({type(error).__name__}: {error})"
        ) from error


def _set_damaged_list_aside(config: Config) -> None:
    """Rename a left_out.json that is damaged: what the run leaves out from now on is not in it."""
    path = _left_out_file(config)
    try:
        _parse_left_out(path)
    except FileNotFoundError:
        return
    except DataError:
        aside = path.with_name(f"{path.name}.damaged")
        give_name(path, aside)
        log.warning("%s is now %s", path.name, aside.name)


def set_former_run_aside(state: TrainState) -> None:
    """Move away what another run has left in run_dir; one rank calls it.

    A new run starts from nothing; one that goes on keeps what it wrote itself.
    """
    own = Path(state.config.run_dir)
    if state.step:
        _set_damaged_list_aside(state.config)
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
