"""What of a run is kept in the memory of its nodes, and going on from there in the same layout.

A rank's share is its part of the FP32 weights and of the optimizer's state, which no other rank has (with AdamW 12
bytes a parameter over the data-parallel ranks), and what of its model is not trained. The weights that the model
computes with are made of the FP32 ones, as after every step.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm import config as configs
from megatron_mm.checkpoint.copies import Copies, Found
from megatron_mm.checkpoint.format import Fence, read_manifest, step_of
from megatron_mm.checkpoint.optimizer_shards import states_of
from megatron_mm.checkpoint.shares import read_share
from megatron_mm.data.consumption import LeftOut
from megatron_mm.training import checkpoints
from megatron_mm.training.optimizer import build_scheduler, set_steps_done, steps_done
from megatron_mm.training.state import TrainState, settle_parameters

log = logging.getLogger(__name__)

VARIES = "_extra_state"
"""Ends the names of what TransformerEngine keeps of its own, in a tensor of any size."""


def make_copies(state: TrainState, fence: Fence | None) -> Copies | None:
    """Return what keeps copies of the run of `state`, None if it is to have none. Collective over all ranks.

    Raises ConfigError if they have no room.
    """
    settings = state.config.checkpoint
    if not settings.memory_interval:
        return None
    copies = Copies(settings.memory_dir, state.config.run_dir, state.mesh, fence)
    copies.require_room(sum(tensor.nbytes for tensor in _tensors(state).values()))
    return copies


def begin_copy(state: TrainState, copies: Copies) -> None:
    """Start to copy `state` to the memory of the nodes, in the background. Collective over all ranks."""
    settle_parameters(state)
    copies.begin(
        state.step,
        _tensors(state),
        own={"steps_done": steps_done(state.optimizer)},
        facts={**checkpoints.facts_of(state), "layout": _layout(state)},
        settings=configs.to_yaml(configs.anchor(state.config)),
    )


def restore(state: TrainState, copies: Copies, *, newest: Path) -> int | None:
    """Bring `state` to the newest copy in memory that is whole, if it is newer than the checkpoint `newest`.

    Return its step, None if there is none: every reason is logged. Collective over all ranks.
    """
    found = copies.recover(lambda path: _refuse(path, state, newest))
    if found is None:
        return None
    own = _read(state, found)
    everywhere: list[Any] = [None] * state.mesh.world_size
    dist.all_gather_object(everywhere, own if isinstance(own, str) else None)
    reasons = [reason for reason in everywhere if reason is not None]
    if reasons or isinstance(own, str):
        if state.mesh.is_rank_0:
            log.warning("the copy of step %d in memory is not used: %s", step_of(found.path), reasons[0])
        copies.drop()
        return None
    facts = read_manifest(found.path)
    changed = configs.check_resume(
        configs.load_saved(found.path / "config.yaml"), state.config, step=int(facts["step"]), source=str(found.path)
    )
    _load(state, *own)
    checkpoints.take_facts(state, found.path, facts, changed)
    state.scheduler = build_scheduler(state.config, state.optimizer, step=state.step)
    if state.mesh.is_rank_0:
        log.warning(
            "going on from step %d, of which the nodes have kept copies in memory; the newest checkpoint is %s. "
            "%d of %d ranks had their share from another node",
            *(state.step, newest.name, found.fetched, state.mesh.world_size),
        )
    return state.step


def _layout(state: TrainState) -> str:
    return f"{state.mesh.describe()} on {state.mesh.world_size} ranks"


def _refuse(path: Path, state: TrainState, newest: Path) -> str | None:
    """Return why a copy, whose manifest is whole, is not one that `state` can go on from; None if it is.

    Raises ConfigError if a setting has changed that cannot change.
    """
    copy, saved = read_manifest(path), read_manifest(newest)
    if copy.get("run") != saved.get("run"):
        return "it is of another run"
    if step_of(path) <= step_of(newest):
        return f"{newest.name} is not older"
    if copy["layout"] != _layout(state):
        return f"it is of the layout {copy['layout']}, this one is {_layout(state)}; checkpoints fit every layout"
    lives = saved.get("lives", [])
    if copy["lives"][: len(lives)] != lives:
        return f"the run has gone another way since: {newest.name} is of a life that it knows nothing of"
    now = checkpoints.consumption_of(state.config, newest)
    if tuple(LeftOut(*map(int, part)) for part in copy["left_out"]) != now.left_out:
        return "the run has left out other batches since"
    if state.inputs is not None and copy["inputs"] != state.inputs.as_json():
        return "the names or contents of shards or files have changed"
    settings = configs.load_saved(path / "config.yaml")
    configs.check_resume(settings, state.config, step=step_of(path), source=str(path))
    return None


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Return what this rank needs to go on in the same layout, by name: views where these are tensors of the CPU."""
    names = {id(parameter): f"{number}.{name}" for number, name, parameter in _parameters(state)}
    own = {
        f"optimizer.{name}.{names[id(parameter)]}.{first}": value
        for part in state.optimizer.chained_optimizers
        for parameter, name, value, first in states_of(part)
    }
    return {**own, **{f"model.{key}": value for key, value in _untrained(state).items()}}


def _parameters(state: TrainState) -> list[tuple[int, str, Tensor]]:
    return [(number, *one) for number, chunk in enumerate(state.chunks) for one in chunk.named_parameters()]


def _untrained(state: TrainState) -> dict[str, Tensor]:
    """Return the tensors of the model that are not made of the optimizer's: frozen ones, buffers, extra state."""
    trained = {f"{number}.{name}" for number, name, parameter in _parameters(state) if parameter.requires_grad}
    whole = {f"{number}.{key}": value for number, chunk in enumerate(state.chunks)
             for key, value in chunk.state_dict().items()}  # fmt: skip
    return {key: value for key, value in whole.items() if key not in trained and value is not None}


def _read(state: TrainState, found: Found) -> tuple[dict[str, Tensor], dict[str, Any]] | str:
    """Return what this rank's share holds: tensors and what is beside them; why it does not fit this rank, as text."""
    described = _tensors(state)
    try:
        saved, own = read_share(found.share)
    except (OSError, ValueError, RuntimeError) as error:
        return f"{found.share} cannot be read ({type(error).__name__}: {error})"
    kinds = [
        {name: None if name.endswith(VARIES) else (value.dtype, value.shape) for name, value in one.items()}
        for one in (saved, described)
    ]
    if kinds[0] != kinds[1]:
        return f"{found.share} has other tensors than this rank: a setting has changed that says what they are"
    return saved, own


def _load(state: TrainState, saved: dict[str, Tensor], own: dict[str, Any]) -> None:
    """Bring this rank's tensors to those of its share, and the model's weights to the FP32 ones. Collective."""
    described = _tensors(state)
    with torch.no_grad():
        for name, tensor in described.items():
            if name.startswith("optimizer."):
                tensor.copy_(saved[name])
    for number, chunk in enumerate(state.chunks):
        prefix = f"model.{number}."
        chunk.load_state_dict(
            {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}, strict=False
        )
    set_steps_done(state.optimizer, own["steps_done"])
    for part in state.optimizer.chained_optimizers:
        part._copy_main_params_to_model_params()
    if state.config.parallel.overlap_param_gather:
        settle_parameters(state)
    else:
        for model in state.models:
            model.start_param_sync()
