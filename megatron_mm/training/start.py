"""What a new run starts from: another checkpoint's weights, a converted decoder, pretrained encoders."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.engine.mesh import Mesh
from megatron_mm.errors import ConfigError
from megatron_mm.hf.pickles import only_plain_pickles
from megatron_mm.hf.tensors import CheckpointReader, TensorInfo
from megatron_mm.modalities import BY_NAME, RANDOM
from megatron_mm.modalities.pretrained import file_of, load_pretrained
from megatron_mm.model.multimodal import MultimodalModel
from megatron_mm.model.shapes import compare_shapes, tensor_shapes
from megatron_mm.training.state import TrainState

log = logging.getLogger(__name__)

ENCODERS = {f"embedding.{name}.": name for name in BY_NAME}
"""What a checkpoint may lack as a whole, and whose settings then say what stands there: a text model starts a
multimodal one."""
SECTIONS = {"model.": "decoder.", **{f"{section}.": tensors for tensors, section in ENCODERS.items()}}
"""Settings of a checkpoint that must be the run's, and the tensors that they describe."""
MAY_DIFFER = {
    "model.init_std",
    *(f"{part}.{key}" for part in BY_NAME for key in ("pretrained", "trainable")),
}
"""Of these, what says nothing about what the weights mean."""


def start(state: TrainState) -> None:
    """Bring a new run's weights to what its settings name. Collective over all ranks if that is a checkpoint.

    `check_start` and `check_start_from` have passed. Raises DataError for a file that does not fit, ConfigError for a
    checkpoint of another shape.
    """
    config = state.config
    if config.training.start_from:
        path = Path(config.training.start_from)
        load_weights(state.chunks, config=config, mesh=state.mesh, path=path)
    load_pretrained(state.chunks, config.encoders)
    if config.training.start_from or any(map(file_of, config.encoders.values())):
        state.optimizer.reload_model_params()


def load_weights(chunks: Sequence[MultimodalModel], *, config: Config, mesh: Mesh, path: Path) -> None:
    """Give every chunk the weights at `path`, saved in whatever layout. Collective over all ranks.

    A modality that the checkpoint lacks is as it was, and rank 0 says so. Raises as `check_model`.
    """
    stored = check_model(config, path)
    lacking = _lacking(stored)
    metadata = {"singleton_local_shards": False, "dp_cp_group": mesh.dp_cp_group}
    present = {}
    for number, chunk in enumerate(chunks):
        wanted = chunk.sharded_state_dict(metadata=metadata)
        present[f"chunk{number}"] = {name: part for name, part in wanted.items() if not name.startswith(lacking)}
    # All chunks at once: megatron-core checks that the ranks together hold each tensor whole.
    with only_plain_pickles(path):
        loaded = dist_checkpointing.load(present, str(path), strict=StrictHandling.RAISE_UNEXPECTED)
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"chunk{number}"], strict=False)
    if mesh.is_rank_0:
        log.info("weights of %s", path)
        for part in lacking:
            log.info("%s* is not in it", part)


def check_start_from(config: Config, path: Path) -> None:
    """Pass if a new run can start from the checkpoint at `path`, no encoder random or thrown away in silence.

    Writes nothing and needs no built model: to be called before a run touches anything. Raises ConfigError with every
    reason, DataError if the checkpoint is damaged.
    """
    lacking, wrong = _lacking(check_model(config, path)), []
    untrained = configs.untrained_encoders(configs.load_saved(path / "config.yaml"))
    for part, name in ENCODERS.items():
        pretrained = getattr(config, name).pretrained
        absent = part in lacking or name in untrained
        if absent and pretrained is None:
            what = "no" if part in lacking else "a frozen and never pretrained"
            wrong.append(
                f"training.start_from={path} has {what} {name} encoder, and {name}.pretrained is not given. Give it "
                f"the file of a pretrained one; {name}.pretrained=random trains one from random weights."
            )
        elif not absent and pretrained == RANDOM:
            wrong.append(
                f"{name}.pretrained=random would throw away the {name} encoder of training.start_from={path}. Set "
                f"{name}.pretrained=null to go on with it, or give the file of another one."
            )
    if wrong:
        raise ConfigError("\n".join(wrong))


def check_model(config: Config, path: Path) -> dict[str, TensorInfo]:
    """Pass if the checkpoint at `path` is of the run's model, by the names, shapes and meaning of all its tensors.

    A modality may be missing as a whole. Returns what the checkpoint holds. Raises ConfigError with every difference,
    DataError if the checkpoint is damaged.
    """
    stored = CheckpointReader(path).tensors
    lacking = _lacking(stored)
    expected = {name: shape for name, shape in tensor_shapes(config).items() if not name.startswith(lacking)}
    changed = configs.differences(configs.load_saved(path / "config.yaml"), config)
    wrong = [line for key, line in changed.items() if _describes(key, lacking)]
    wrong += compare_shapes({name: info.shape for name, info in stored.items()}, expected)
    if wrong:
        raise ConfigError(
            f"training.start_from={path} is another model (its settings and tensors -> this run's):\n  "
            + "\n  ".join(wrong)
            + f"\nSet what differs as in {path / 'config.yaml'}, or start from another checkpoint."
        )
    return stored


def _lacking(stored: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return the modalities of which a checkpoint has nothing."""
    return tuple(part for part in ENCODERS if not any(name.startswith(part) for name in stored))


def _describes(key: str, lacking: tuple[str, ...]) -> bool:
    """Tell whether a setting describes tensors that the checkpoint has."""
    described = [tensors for section, tensors in SECTIONS.items() if key.startswith(section)]
    return bool(described) and key not in MAY_DIFFER and described[0] not in lacking
