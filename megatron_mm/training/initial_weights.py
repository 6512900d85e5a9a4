"""What a new run starts from: another checkpoint's weights, a converted decoder, pretrained encoders."""

from pathlib import Path

from megatron_mm import config as configs
from megatron_mm.checkpoint.load import ENCODERS, check_model, lacking_parts, load_weights
from megatron_mm.config import Config
from megatron_mm.data.consumption import Consumption
from megatron_mm.errors import ConfigError
from megatron_mm.modalities import RANDOM
from megatron_mm.modalities.pretrained import file_of, load_pretrained
from megatron_mm.model.initialize import initialize_weights
from megatron_mm.training.optimizer import build_scheduler, reset_optimizer
from megatron_mm.training.state import TrainState


def load_initial_weights(state: TrainState) -> None:
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


def begin_anew(state: TrainState) -> None:
    """Bring a run that has no checkpoint back to step 0, to the bit. Collective over all ranks.

    Raises as load_initial_weights.
    """
    for chunk in state.chunks:
        initialize_weights(chunk, config=state.config, mesh=state.mesh)
    state.optimizer.reload_model_params()
    load_initial_weights(state)
    reset_optimizer(state.optimizer)
    state.step, state.changes = 0, []
    state.consumption = Consumption(((0, state.config.training.global_batch_size),))
    state.scheduler = build_scheduler(state.config, state.optimizer, step=0)


def check_start_from(config: Config, path: Path) -> None:
    """Pass if a new run can start from the checkpoint at `path`, no encoder random or thrown away in silence.

    Writes nothing and needs no built model: to be called before a run touches anything. Raises ConfigError with every
    reason, DataError if the checkpoint is damaged.
    """
    lacking, wrong = lacking_parts(check_model(config, path)), []
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
        raise ConfigError("\n  ".join(wrong))
