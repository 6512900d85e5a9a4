"""Every layout trains the same model: losses, gradient norms and all gradients equal those of one rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from small import TRAINED, layout, small_config

from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import mesh as meshes
from megatron_mm.model.initialize import name_in_whole_model
from megatron_mm.model.loss import by_name
from megatron_mm.training.state import TrainState, build_state
from megatron_mm.training.step import train_step

STEPS = 5
TOLERANCE = 1e-5
"""FP32 everywhere: layouts differ only in the order of sums."""

LAYOUTS = [
    ("tp=2", 2),
    ("pp=2", 2),
    ("tp=2 pp=2", 4),
    ("pp=2 vpp=2", 2),
    ("tp=2 pp=2 vpp=2", 4),
    ("", 2),
    ("tp=2", 4),
    ("cp=2", 2),
    ("cp=4", 4),
    ("cp=2", 4),
    ("tp=2 cp=2", 4),
    ("pp=2 cp=2", 4),
]
"""Layouts and the ranks that they run on; data parallelism is what remains."""


def full_gradients(state: TrainState) -> dict[str, torch.Tensor]:
    """Return every gradient, whole, by the parameter's name in the whole model. Collective over all ranks."""
    mesh = state.mesh
    for model in state.models:
        for buffer in model.buffers:
            for bucket in buffer.buckets:  # the distributed optimizer keeps one shard of each on each rank
                shards = list(bucket.grad_data.chunk(mesh.dp_cp_group.size()))
                dist.all_gather(shards, shards[mesh.dp_cp_group.rank()].clone(), group=mesh.dp_cp_group)
    own = {}
    for chunk in state.chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad:
                own[name_in_whole_model(chunk, name)] = gather_shards(parameter, mesh)
    gathered: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(gathered, own)
    return {name: gradient for part in gathered for name, gradient in part.items()}


def gather_shards(parameter: torch.nn.Parameter, mesh: meshes.Mesh) -> torch.Tensor:
    gradient = parameter.main_grad.clone()
    if mesh.tp_size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return gradient
    parts = [torch.empty_like(gradient) for _ in range(mesh.tp_size)]
    dist.all_gather(parts, gradient, group=mesh.tp_group)
    dim = parameter.partition_dim
    blocks = [part.chunk(parameter.partition_stride, dim) for part in parts]  # [gate; up] of each rank
    return torch.cat([block[number] for number in range(parameter.partition_stride) for block in blocks], dim)


def curve(config: Config, steps: int) -> dict[str, Any]:
    """Train `steps` steps and return losses, gradient norms and gradients of every step."""
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    state = build_state(config, mesh)
    seen: dict[str, Any] = {"losses": [], "grad_norms": [], "gradients": [], "images": []}
    for step in range(steps):
        micro_batches = loader.step(step)
        result = train_step(state, micro_batches)
        seen["losses"].append(by_name(result.losses))
        seen["grad_norms"].append(result.grad_norm)
        seen["gradients"].append(full_gradients(state))
        seen["images"].append([len(micro_batch.media["image"].inputs) for micro_batch in micro_batches])
    return seen


def assert_same_curve(split: dict[str, Any], alone: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    for step in range(len(alone["losses"])):
        assert split["losses"][step] == pytest.approx(alone["losses"][step], rel=tolerance)
        assert split["grad_norms"][step] == pytest.approx(alone["grad_norms"][step], rel=tolerance)
        assert_same_gradients(split["gradients"][step], alone["gradients"][step], tolerance)


def assert_same_gradients(split: dict[str, torch.Tensor], alone: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare tensor by tensor, relative to the largest element of each.

    The bias of attention's keys has no gradient but rounding, since softmax does not see it: it is a sum of terms that
    cancel, each rounded to 6e-8 of itself. What is below a hundred-thousandth of the largest gradient of all is
    compared with that instead.
    """
    assert split.keys() == alone.keys()
    floor = 1e-5 * max(gradient.abs().max().item() for gradient in alone.values())
    for name, gradient in alone.items():
        error = (split[name] - gradient).abs().max().item()
        assert error <= tolerance * max(gradient.abs().max().item(), floor), f"{name} is off by {error:.2e}"


@pytest.fixture(scope="module")
def alone(shards: Path) -> dict[str, Any]:
    (seen,) = run_ranks(1, curve, small_config(shards, "unused", *TRAINED), STEPS)
    return seen


def test_the_batches_hold_what_could_go_wrong(alone: dict[str, Any]) -> None:
    images = alone["images"]
    assert any(0 in step and max(step) >= 1 for step in images), "a micro-batch with no image beside one with some"
    assert all({"loss/text", "loss/image", "loss/audio"} <= losses.keys() for losses in alone["losses"][:1])
    assert any("loss/pdf" in losses for losses in alone["losses"])


@pytest.mark.parametrize(("text", "ranks"), LAYOUTS)
def test_a_layout_gives_the_curve_of_one_rank(text: str, ranks: int, shards: Path, alone: dict[str, Any]) -> None:
    config = small_config(shards, "unused", *TRAINED, *layout(text))
    for split in run_ranks(ranks, curve, config, STEPS):
        assert_same_curve(split, alone)


@pytest.mark.parametrize("text", ["", "tp=2"])
def test_logits_that_are_made_a_part_at_a_time_give_the_same(text: str, shards: Path, alone: dict[str, Any]) -> None:
    config = small_config(shards, "unused", *TRAINED, "training.loss_chunk_tokens=100", *layout(text))
    for split in run_ranks(2 if text else 1, curve, config, 1):
        first = {name: values[:1] for name, values in alone.items()}
        assert_same_curve(split, first)
