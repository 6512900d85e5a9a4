"""Replicated parameters stay the same to the bit, and the run stops where they do not."""

from pathlib import Path

import pytest
import torch
from launch import run_ranks
from small import TRAINED, layout, small_config

from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import mesh as meshes
from megatron_mm.training.replicas import ReplicasDiffer, bit_hash, check_replicas
from megatron_mm.training.state import build_state
from megatron_mm.training.step import train_step


def train_and_check(config: Config, steps: int, spoil: tuple[int, str] | None = None) -> str:
    """Train `steps` steps, flip one bit of a parameter of one rank, and return what the check says."""
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    state = build_state(config, mesh)
    for step in range(steps):
        train_step(state, loader.step(step))
    if spoil is not None and mesh.rank == spoil[0]:
        parameters = dict(pair for chunk in state.chunks for pair in chunk.named_parameters())
        parameters[spoil[1]].data.view(-1).view(torch.int32)[3] ^= 1
    try:
        check_replicas(state)
    except ReplicasDiffer as error:
        return str(error)
    return "the same"


def test_replicas_are_the_same_after_50_steps_on_8_ranks(shards: Path) -> None:
    cheap = ["training.global_batch_size=2", "training.steps=50", *TRAINED]
    config = small_config(shards, "unused", *cheap, *layout("tp=2 cp=2"))
    assert run_ranks(8, train_and_check, config, steps=50) == ["the same"] * 8


NORM = "decoder.layers.1.input_layernorm.weight"
SHARD = "decoder.layers.1.mlp.linear_fc1.weight"


@pytest.mark.parametrize(
    ("text", "ranks", "rank", "name"),
    [("tp=4", 4, 2, NORM), ("cp=4", 4, 1, SHARD), ("", 4, 3, SHARD), ("tp=2 overlap_grad_reduce=true", 4, 0, NORM)],
)
def test_a_flipped_bit_is_named_on_every_rank(text: str, ranks: int, rank: int, name: str, shards: Path) -> None:
    config = small_config(shards, "unused", "training.global_batch_size=4", *layout(text))
    for said in run_ranks(ranks, train_and_check, config, steps=1, spoil=(rank, name)):
        assert f"rank {rank}: {name}" in said
        assert said.startswith("after step 1 ")


def test_of_two_that_differ_both_are_named(shards: Path) -> None:
    config = small_config(shards, "unused", *layout("tp=2"))
    for said in run_ranks(2, train_and_check, config, steps=1, spoil=(1, NORM)):
        assert f"rank 0: {NORM}" in said
        assert f"rank 1: {NORM}" in said


def test_a_shard_is_not_compared_over_tp(shards: Path) -> None:
    config = small_config(shards, "unused", *layout("tp=2"))
    assert run_ranks(2, train_and_check, config, steps=1, spoil=(0, SHARD)) == ["the same"] * 2


def test_the_hash_sees_every_bit_and_place() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
        swapped, flipped = tensor.clone(), tensor.clone()
        swapped[[1, 2]] = tensor[[2, 1]]
        flipped[999] = -flipped[999]
        assert len({int(bit_hash(each)) for each in (tensor, swapped, flipped, tensor[:999])}) == 4
        assert bit_hash(tensor.reshape(10, 100)) == bit_hash(tensor)
