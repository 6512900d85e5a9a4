"""Everything that a start checks, before it touches anything: a mistake costs a minute, not a run that was healthy."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mm import config as configs
from megatron_mm.checkpoint.format import COMMITTED, damaged_ones, read_manifest, step_of, unfinished_ones, whole_ones
from megatron_mm.checkpoint.load import await_seen
from megatron_mm.checkpoint.verify import find_damage
from megatron_mm.config import Config
from megatron_mm.data.consumption import Consumption
from megatron_mm.data.loader import Loader
from megatron_mm.engine.agreement import check_alike, describe_software, together
from megatron_mm.engine.mesh import Mesh, settings_by_key
from megatron_mm.errors import ConfigError
from megatron_mm.modalities.pretrained import check_pretrained
from megatron_mm.retry import be_patient, retrying
from megatron_mm.training import checkpoints
from megatron_mm.training.initial_weights import check_start_from
from megatron_mm.training.inputs import (
    Inputs,
    check_bytes,
    check_held_out,
    check_same_inputs,
    check_stored_tokenizer,
    check_tokenizers,
    read_inputs,
)
from megatron_mm.training.living import check_nobody_lives

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """What the checks have opened and found."""

    loader: Loader
    heldout: Loader | None
    inputs: Inputs
    goes_on_from: Path | None
    """The newest committed checkpoint of the run, None if this start is its first."""


def prepare(config: Config, mesh: Mesh, *, computes: Mapping[str, str]) -> Ready:
    """Return what a run needs, once everything is checked; nothing on the disk is changed. Collective over all ranks.

    `computes` are what this rank has chosen to compute with: kernels, layers, attention, device.
    Raises ConfigError or DataError, on all ranks alike, for settings, software, shards, tokenizers or files that differ
    between ranks or do not fit one another, the model, or the checkpoint that the run goes on from; for a run_dir that
    cannot be written, or in which another run lives.
    """
    be_patient(config.guard.retry_minutes)
    check_alike({**describe_software(), **computes}, what="software")
    check_alike(settings_by_key(config), what="settings")
    together(lambda: check_run_dir(config) if mesh.is_rank_0 else None)
    past = checkpoints.from_rank_0(mesh, lambda: find_past(config))
    if past.path is not None:
        await_seen(mesh, past.path)
    ready = together(lambda: examine(config, mesh, past))
    check_alike(ready.inputs.by_name(), what="data and files")
    if ready.goes_on_from is None:
        return ready
    return replace(ready, inputs=together(lambda: compare(ready, config, looks=mesh.is_rank_0)))


@dataclass(frozen=True)
class Past:
    """What one rank, for all, has found of a run that is to go on."""

    path: Path | None
    """Its newest committed checkpoint, None if it has none."""
    consumption: Consumption


def find_past(config: Config) -> Past:
    """Return what a run of `config` goes on from. Raises as newest_checkpoint does."""
    path = newest_checkpoint(config)
    return Past(path, checkpoints.consumption_of(config, path))


def examine(config: Config, mesh: Mesh, past: Past) -> Ready:
    """Open and check on this rank all that a start needs. No communication."""
    configs.check_start(config)
    path = past.path
    if path is not None:
        saved = configs.load_saved(path / "config.yaml")
        left_out = past.consumption.left_out  # counted with the weights that their steps had
        settled = max([step_of(path), *(part.step + 1 for part in left_out)])
        configs.check_resume(saved, config, step=settled, source=str(path))
    else:
        _check_weights(config)
    check_held_out(config)
    loader = Loader(config.data.train, config=config, mesh=mesh, changes=config.data.changes)
    heldout = None
    if config.data.validation:
        heldout = Loader(config.data.validation, config=config, mesh=mesh, report_apart=True)
    check_tokenizers(loader.shards[0], heldout.shards[0] if heldout else None, is_rank_0=mesh.is_rank_0)
    check_bytes([*loader.shards, *(heldout.shards if heldout else [])], share=mesh.rank, of=mesh.world_size)
    if path is None and config.training.start_from:
        source = Path(config.training.start_from)
        check_stored_tokenizer(source, loader.shards[0], what="training.start_from", is_rank_0=mesh.is_rank_0)
    inputs = read_inputs(config, loader.shards[0].tokenizer.sha256, hash_files=path is None)
    return Ready(loader, heldout, inputs, path)


def _check_weights(config: Config) -> None:
    """Pass if the files that a new run's weights come from fit its model; one rank of each node reads them."""
    if config.training.start_from:
        check_start_from(config, Path(config.training.start_from))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        check_pretrained(config.encoders)


def newest_checkpoint(config: Config) -> Path | None:
    """Return the newest checkpoint of the run whose settings can be read, None if the run has none at all.

    Raises ConfigError if there is one and the run is not to go on, or if all that there were have been set aside;
    DataError if none can be read.
    """
    folder = checkpoints.folder(config)
    paths = whole_ones(folder)
    if paths and not config.checkpoint.resume:
        raise ConfigError(
            f"checkpoint.resume=false, but run_dir={config.run_dir} holds {paths[-1].name}. Use another run_dir, or "
            "remove that one."
        )
    problems = {path: find_damage(path, names=("config.yaml",)) for path in reversed(paths)}
    whole = next((path for path, found in problems.items() if not found), None)
    problems |= {path: [f"{path} has no {COMMITTED}"] for path in unfinished_ones(folder)}
    damaged = damaged_ones(folder)
    if whole is None and (problems or damaged):
        raise checkpoints.no_whole_checkpoint(folder, problems, damaged)
    if whole is not None and (newer := [path.name for path in damaged if step_of(path) > step_of(whole)]):
        log.warning("%s were set aside as damaged: going on from %s, which is older", ", ".join(newer), whole.name)
    return whole


def compare(ready: Ready, config: Config, *, looks: bool) -> Inputs:
    """Return the inputs of the run that goes on, once they are known to be those that it had; one rank reads files."""
    assert ready.goes_on_from is not None
    path = ready.goes_on_from
    saved = Inputs.of(read_manifest(path).get("inputs"))
    if saved is None:
        if looks:
            log.warning("%s does not record what it was trained on: shards and files are not compared", path)
        return ready.inputs
    if looks:
        now = read_inputs(config, ready.inputs.tokenizer, hash_files=True)
        then = configs.load_saved(path / "config.yaml")
        for line in check_same_inputs(saved, now, configs=(then, config), step=step_of(path)):
            log.info("changed since the checkpoint: %s", line)
    return replace(ready.inputs, files=saved.files)


def check_run_dir(config: Config) -> None:
    """Raise ConfigError if the run_dir cannot be written, or another run is at work in it."""
    folder = Path(config.run_dir)
    parents = (folder.absolute(), *folder.absolute().parents)
    there = retrying(lambda: next(parent for parent in parents if parent.exists()), what=folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        what = f"{there} is not a folder" if not there.is_dir() else f"PermissionError: {there} is closed to this user"
        raise ConfigError(f"run_dir={config.run_dir} cannot be written: {what}. Give one that can.")
    check_nobody_lives(config.run_dir, heartbeat_seconds=config.guard.heartbeat_seconds)
