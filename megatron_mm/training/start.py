"""What a new run starts from: another checkpoint's weights, a converted decoder, pretrained encoders."""

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.hf.encoders import load_pretrained
from megatron_mm.hf.pickles import only_plain_pickles
from megatron_mm.hf.tensors import CheckpointReader
from megatron_mm.model.multimodal import MultimodalModel
from megatron_mm.parallel.mesh import Mesh
from megatron_mm.training.state import TrainState

log = logging.getLogger(__name__)

MODALITIES = ("embedding.image.", "embedding.audio.")
"""What a checkpoint may lack as a whole: a text model starts a multimodal one."""


def start(state: TrainState) -> None:
    """Bring a new run's weights to what its settings name. Collective over all ranks if that is a checkpoint.

    Raises DataError for a file that does not fit, ConfigError for a checkpoint of another shape.
    """
    config = state.config
    if config.training.start_from:
        path = Path(config.training.start_from)
        load_weights(state.chunks, config=config, mesh=state.mesh, path=path)
    load_pretrained(state.chunks, config)
    if config.training.start_from or config.vision.pretrained or config.audio.pretrained:
        state.optimizer.reload_model_params()


def load_weights(chunks: Sequence[MultimodalModel], *, config: Config, mesh: Mesh, path: Path) -> None:
    """Give every chunk the weights at `path`, saved in whatever layout. Collective over all ranks.

    A modality that the checkpoint lacks keeps its initial weights, and rank 0 says so.
    """
    stored = CheckpointReader(path).keys
    _check_shape(path, config)
    lacking = tuple(part for part in MODALITIES if not any(key.startswith(part) for key in stored))
    metadata = {"singleton_local_shards": False, "dp_cp_group": mesh.dp_cp_group}
    present = {}
    for number, chunk in enumerate(chunks):
        wanted = chunk.sharded_state_dict(metadata=metadata)
        absent = [name for name, part in wanted.items() if part.key not in stored]
        foreign = [name for name in absent if not name.startswith(lacking)]
        if foreign:
            raise DataError(f"{path} lacks {', '.join(foreign)}: it is another model's.")
        present[f"chunk{number}"] = {name: part for name, part in wanted.items() if name not in absent}
    # All chunks at once: megatron-core checks that the ranks together hold each tensor whole.
    with only_plain_pickles(path):
        loaded = dist_checkpointing.load(present, str(path), strict=StrictHandling.RAISE_UNEXPECTED)
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"chunk{number}"], strict=False)
    if mesh.speaks:
        log.info("weights of %s", path)
        for part in lacking:
            log.info("%s* is not in it and keeps its initial weights", part)


def _check_shape(path: Path, config: Config) -> None:
    """Raise ConfigError if the checkpoint's decoder is of another shape than the run's."""
    changed = configs.differences(configs.load(str(path / "config.yaml")), config)
    changed.pop("model.init_std", None)
    wrong = [line for key, line in changed.items() if key.startswith("model.")]
    if wrong:
        raise ConfigError(f"training.start_from={path} is another model:\n" + "\n".join(wrong))
