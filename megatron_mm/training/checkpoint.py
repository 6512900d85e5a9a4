"""Saving a run and going on from it, in the same layout or another.

A checkpoint is a folder run_dir/checkpoints/step_N of megatron-core's global tensors, the resolved configuration and a
manifest. It is written beside and renamed when whole, so a folder with that name is a whole one.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.parallel import device
from megatron_mm.training.optimizer import build_scheduler
from megatron_mm.training.state import TrainState, settle_parameters

log = logging.getLogger(__name__)

MAY_CHANGE = (
    *("preset", "run_dir", "parallel.", "checkpoint.", "evaluation.", "logging.", "schedule."),
    *("training.start_from", "vision.pretrained", "audio.pretrained"),
    *("training.steps", "training.stop_after", "training.micro_batch_size", "training.recompute", "training.kernels"),
    *("training.backend", "training.attention", "training.check_replicas_interval"),
    *("data.validation", "data.prefetch_steps", "data.changes"),
)
"""Settings that a resumed run may have different from the one that was saved."""


def folder(config: Config) -> Path:
    """Return where the checkpoints of a run are."""
    return Path(config.run_dir) / "checkpoints"


def newest(config: Config) -> Path | None:
    """Return the newest whole checkpoint of a run, None if it has none."""
    found = [path for path in folder(config).glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return max(found, key=lambda path: int(path.name.removeprefix("step_")), default=None)


def save(state: TrainState) -> Path:
    """Save `state` and return the folder; only the newest checkpoint.keep are kept. Collective over all ranks."""
    final = folder(state.config) / f"step_{state.step:08d}"
    partial = final.with_name(final.name + ".partial")
    if state.mesh.speaks:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    settle_parameters(state)
    _prepare_writer()
    metadata = _metadata(state)
    content = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
    dist_checkpointing.save(_sharded_state(state, metadata, loading=False), str(partial), content_metadata=content)
    if state.mesh.speaks:
        (partial / "config.yaml").write_text(configs.to_yaml(state.config))
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps({"step": state.step, "bytes": sizes}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _remove_old(state.config)
        log.info("step %d | saved %s", state.step, final)
    dist.barrier()
    return final


def load(state: TrainState, path: Path) -> None:
    """Bring `state`, in whatever layout, to what was saved at `path`. Collective over all ranks.

    Raises DataError if a file is missing or cut short, ConfigError if a setting that must not change has changed.
    """
    step = _check_files(path)
    _check_settings(path, state.config)
    metadata = _metadata(state)
    loaded = dist_checkpointing.load(
        _sharded_state(state, metadata, loading=True), str(path), strict=StrictHandling.RAISE_ALL
    )
    for chunk, key in zip(state.chunks, _chunk_keys(state)):
        chunk.load_state_dict(loaded[key])
    state.optimizer.load_state_dict(loaded["optimizer"])
    state.step = step
    state.scheduler = build_scheduler(state.config, state.optimizer, step=step)


def _chunk_keys(state: TrainState) -> list[str]:
    return ["model"] if len(state.chunks) == 1 else [f"model{number}" for number in range(len(state.chunks))]


def _metadata(state: TrainState) -> dict[str, Any]:
    """Return how megatron-core should lay out tensors: as whole ones that any layout can cut."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": state.mesh.dp_cp_group,
    }


def _sharded_state(state: TrainState, metadata: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    chunks = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in zip(_chunk_keys(state), state.chunks)}
    model = chunks["model"] if len(chunks) == 1 else chunks
    optimizer = state.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {**chunks, "optimizer": optimizer}


def _prepare_writer() -> None:
    """Let megatron-core's writer fork its queue: it would start a fresh interpreter, which takes seconds a rank."""
    if not device.has_gpu():
        filesystem_async.get_write_results_queue("fork")


def _remove_old(config: Config) -> None:
    whole = sorted(path for path in folder(config).glob("step_*") if re.fullmatch(r"step_\d+", path.name))
    for path in whole[: -config.checkpoint.keep]:
        shutil.rmtree(path)


def _check_files(path: Path) -> int:
    """Return the step of a checkpoint. Raises DataError if a file of it is missing or has another size."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}/manifest.json cannot be read ({error}): remove {path} to go on from the one before."
        ) from error
    for name, size in manifest["bytes"].items():
        file = path / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            raise DataError(
                f"{file} has {found if found is not None else 'no'} bytes, its manifest says {size}: the checkpoint is "
                f"damaged. Remove {path} to go on from the one before."
            )
    return int(manifest["step"])


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
