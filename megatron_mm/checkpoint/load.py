"""Loading a checkpoint into a model of any layout, once it is known to be whole and to be that model's."""

import logging
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mm import config as configs
from megatron_mm.checkpoint import verify
from megatron_mm.checkpoint.index import CheckpointReader, TensorInfo
from megatron_mm.checkpoint.pickles import only_plain_pickles
from megatron_mm.config import Config
from megatron_mm.engine.agreement import together
from megatron_mm.engine.mesh import Mesh
from megatron_mm.errors import ConfigError, DataError, StorageFailed
from megatron_mm.modalities import BY_NAME
from megatron_mm.model.multimodal import MultimodalModel
from megatron_mm.model.shapes import compare_shapes, tensor_shapes

log = logging.getLogger(__name__)

VISIBLE_SECONDS = 90.0
"""How long another node may not see a new file: NFS keeps for up to a minute that there was none."""

ENCODERS = {f"embedding.{name}.": name for name in BY_NAME}
"""What a checkpoint may lack as a whole, and whose settings then say what stands there: a text model starts a
multimodal one."""
SECTIONS = {"model.": "decoder.", **{f"{section}.": tensors for tensors, section in ENCODERS.items()}}
"""Settings of a checkpoint that must be the run's, and the tensors that they describe."""
MAY_DIFFER = {
    "model.init_std",
    *(f"{part}.{key}" for part in BY_NAME for key in ("pretrained", "trainable")),
}
"""Settings among these that say nothing about what the weights mean."""


def find_damage_together(mesh: Mesh, path: Path, *, is_source: bool = False) -> list[str]:
    """Return what is wrong with a checkpoint; each rank hashes its share of the files. Collective over all ranks.

    `is_source` is as `verify.find_damage` has it. Raises StorageFailed on all ranks, with the file, if storage does not
    give it to one: that is no damage.
    """
    await_seen(mesh, path)
    everywhere: list[list[str]] = [[]] * mesh.world_size
    own = together(lambda: verify.find_damage(path, share=mesh.rank, of=mesh.world_size, is_source=is_source))
    dist.all_gather_object(everywhere, own)
    return list(dict.fromkeys(line for lines in everywhere for line in lines))


def await_seen(mesh: Mesh, path: Path) -> None:
    """Pass once every rank sees the checkpoint at `path` as rank 0 does. Collective over all ranks.

    A network's file system shows a node what a folder held up to a minute ago. Raises StorageFailed with the ranks that
    do not see it after VISIBLE_SECONDS, ConfigError with those that see another one.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        everywhere: list[tuple[str, str, bool]] = [("", "", False)] * mesh.world_size
        is_late = time.monotonic() > deadline
        dist.all_gather_object(everywhere, (verify.view(path), socket.gethostname(), is_late))
        views = [seen for seen, _, _ in everywhere]
        if len(set(views)) == 1:
            return
        odd = [f"rank {rank} on {host}" for rank, (seen, host, _) in enumerate(everywhere) if seen != views[0]]
        named = ", ".join(odd[:8]) + " ..." * (len(odd) > 8)
        if everywhere[0][2]:
            where = f"{path.absolute()}, which rank 0 goes on from"
            if all(seen == verify.NOT_THERE or seen.startswith("unreadable") for seen in views[1:] if seen != views[0]):
                reasons = "; ".join(sorted(set(views) - {views[0]}))
                raise StorageFailed(f"{named}: {where}, is {reasons}. Look at the file system of these nodes.")
            raise ConfigError(
                f"{named}: {where}, has other files there: it is another folder. Give an absolute run_dir on a file "
                "system that all nodes share."
            )
        if mesh.is_rank_0:
            log.warning("%s do not see %s as rank 0 does: looking again", named, path)
        time.sleep(VISIBLE_SECONDS / 90)


def load_sharded(described: dict[str, Any], path: Path, *, strict: StrictHandling) -> dict[str, Any]:
    """Return what is described as sharded tensors with the values that the checkpoint at `path` has of it.

    Nothing that a file says is executed. Collective over all ranks. Raises what `strict` says for tensors that only one
    of the two has, DataError for a checkpoint that holds anything but plain data, StorageFailed if it cannot be read.
    """
    try:
        with only_plain_pickles(path):
            return dist_checkpointing.load(described, str(path), strict=strict)
    except CheckpointException as error:  # no Exception: torch's own, around what a rank could not do
        causes = [cause for cause, _ in error.failures.values()]
        for cause in causes:
            if isinstance(cause, StorageFailed | DataError):
                raise cause from error
        raise


def load_weights(chunks: Sequence[MultimodalModel], *, config: Config, mesh: Mesh, path: Path) -> None:
    """Give every chunk the weights at `path`, saved in whatever layout, once all its files are as they were written.

    Collective over all ranks. A modality that the checkpoint lacks is as it was, and rank 0 says so; so it does where
    there are no hashes to compare. Raises as `check_model`, and DataError with every file that is damaged.
    """
    problems = find_damage_together(mesh, path, is_source=True)
    if problems:
        raise DataError(f"the checkpoint {path} is damaged:\n  " + "\n  ".join(problems))
    stored = check_model(config, path)
    lacking = lacking_parts(stored)
    metadata = {"singleton_local_shards": False, "dp_cp_group": mesh.dp_cp_group}
    present = {}
    for number, chunk in enumerate(chunks):
        wanted = chunk.sharded_state_dict(metadata=metadata)
        present[f"chunk{number}"] = {name: part for name, part in wanted.items() if not name.startswith(lacking)}
    # All chunks at once: megatron-core checks that the ranks together hold each tensor whole.
    loaded = load_sharded(present, path, strict=StrictHandling.RAISE_UNEXPECTED)
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"chunk{number}"], strict=False)
    if mesh.is_rank_0:
        compared = "" if verify.has_hashes(path) else ", which records no hashes of its files: only sizes were compared"
        log.info("weights of %s%s", path, compared)
        for part in lacking:
            log.info("%s* is not in it", part)


def check_model(config: Config, path: Path) -> dict[str, TensorInfo]:
    """Pass if the checkpoint at `path` is of the run's model, by the names, shapes and meaning of all its tensors.

    A modality may be missing as a whole. Returns what the checkpoint holds. Raises ConfigError with every difference,
    DataError if the checkpoint is damaged.
    """
    stored = CheckpointReader(path).tensors
    lacking = lacking_parts(stored)
    expected = {name: shape for name, shape in tensor_shapes(config).items() if not name.startswith(lacking)}
    changed = configs.differences(configs.load_saved(path / "config.yaml"), config)
    wrong = [line for key, line in changed.items() if _describes(key, lacking)]
    wrong += compare_shapes({name: info.shape for name, info in stored.items()}, expected)
    if wrong:
        raise ConfigError(
            f"training.start_from={path} is another model (its settings and tensors -> this run's):\n  "
            + "\n  ".join(wrong)
            + f"\n  Set what differs as in {path / 'config.yaml'}, or start from another checkpoint."
        )
    return stored


def lacking_parts(stored: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return the parts of a model, modalities all, of which a checkpoint has no tensor: the prefixes of their names."""
    return tuple(part for part in ENCODERS if not any(name.startswith(part) for name in stored))


def _describes(key: str, lacking: tuple[str, ...]) -> bool:
    """Tell whether a setting describes tensors that the checkpoint has."""
    described = [tensors for section, tensors in SECTIONS.items() if key.startswith(section)]
    return bool(described) and key not in MAY_DIFFER and described[0] not in lacking
