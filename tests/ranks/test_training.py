"""Training in every mode: recomputation, precision, encoders, groups; evaluation; and what must stop it."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import run_ranks
from small import TRAINED, layout, small_config
from test_layouts import assert_same_curve, curve
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import mesh as meshes
from megatron_mm.model.loss import by_name
from megatron_mm.training.evaluate import evaluate
from megatron_mm.training.guard import Guard
from megatron_mm.training.state import build_state, total_parameters
from megatron_mm.training.step import train_step


@pytest.mark.parametrize(("text", "form"), [("tp=4", "ls960"), ("tp=2 pp=2", "lv60k")])
def test_trained_encoders_have_the_gradients_of_one_rank(text: str, form: str, shards: Path) -> None:
    trained = [*TRAINED, f"audio.form={form}"]
    (alone,) = run_ranks(1, curve, small_config(shards, "unused", *trained), 2)
    assert any(".encoder." in name for name in alone["gradients"][0])
    # The first layer norm of lv60k sums 3,199 positions a chunk, whose terms cancel but for a thousandth.
    tolerance = 2e-5 if form == "lv60k" else 1e-5
    for split in run_ranks(4, curve, small_config(shards, "unused", *trained, *layout(text)), 2):
        assert_same_curve(split, alone, tolerance)


def test_frozen_encoders_have_no_gradients(shards: Path) -> None:
    (seen,) = run_ranks(1, curve, small_config(shards, "unused"), 1)
    assert not any(".encoder." in name for name in seen["gradients"][0])
    assert any(".projector." in name for name in seen["gradients"][0])


@pytest.mark.parametrize(("groups", "text"), [(2, "tp=4"), (4, "tp=2")])
def test_grouped_queries_agree_with_one_rank(groups: int, text: str, shards: Path) -> None:
    grouped = f"model.num_query_groups={groups}"
    (alone,) = run_ranks(1, curve, small_config(shards, "unused", grouped), 2)
    for split in run_ranks(int(text[-1]), curve, small_config(shards, "unused", grouped, *layout(text)), 2):
        assert_same_curve(split, alone)


@pytest.mark.parametrize(("groups", "text"), [(1, "tp=4"), (2, "tp=2 pp=2"), (1, "tp=2 cp=2")])
def test_query_key_norm_and_z_loss_agree_with_one_rank(groups: int, text: str, shards: Path) -> None:
    settings = ["model.qk_norm=true", "training.z_loss=1e-2", f"model.num_query_groups={groups}"]
    (alone,) = run_ranks(1, curve, small_config(shards, "unused", *settings), 2)
    assert any("query_norm" in name for name in alone["gradients"][0])
    for split in run_ranks(4, curve, small_config(shards, "unused", *settings, *layout(text)), 2):
        assert_same_curve(split, alone)


def test_z_loss_changes_the_gradient_and_not_the_reported_loss(shards: Path) -> None:
    (without,) = run_ranks(1, curve, small_config(shards, "unused"), 1)
    (with_it,) = run_ranks(1, curve, small_config(shards, "unused", "training.z_loss=0.1"), 1)
    assert with_it["losses"][0] == without["losses"][0]
    assert with_it["grad_norms"][0] != pytest.approx(without["grad_norms"][0], rel=1e-2)


@pytest.mark.parametrize("text", ["pp=4 stage_layers=[0,3,2,1]", "pp=2 vpp=2 stage_layers=[1,3,2,0]"])
def test_uneven_stages_agree_with_one_rank(text: str, shards: Path) -> None:
    even = ["parallel.embedding_slot=false", "parallel.loss_slot=false"]
    (alone,) = run_ranks(1, curve, small_config(shards, "unused"), 2)
    for split in run_ranks(4, curve, small_config(shards, "unused", *even, *layout(text)), 2):
        assert_same_curve(split, alone)


@pytest.mark.parametrize("text", ["", "tp=2", "pp=2", "pp=2 vpp=2", "cp=2"])
def test_overlapped_communication_changes_nothing(text: str, shards: Path, heldout: Path) -> None:
    overlap = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", *TRAINED]
    (alone,) = run_ranks(1, curve, small_config(shards, "unused", *TRAINED), 3)
    config = small_config(shards, "unused", *overlap, *layout(text))
    for split in run_ranks(4 if text else 2, curve, config, 3):
        assert_same_curve(split, alone)


@pytest.mark.parametrize("recompute", ["mlp", "full"])
@pytest.mark.parametrize("text", ["tp=2 pp=2"])
def test_recomputation_changes_nothing(recompute: str, text: str, shards: Path) -> None:
    (alone,) = run_ranks(1, curve, small_config(shards, "unused"), 2)
    config = small_config(shards, "unused", f"training.recompute={recompute}", *layout(text))
    for split in run_ranks(4, curve, config, 2):
        assert_same_curve(split, alone)


@pytest.mark.parametrize("recompute", ["none", "selective", "mlp", "full"])
def test_recomputation_saves_activations(recompute: str, shards: Path) -> None:
    """Bytes that autograd keeps for the backward pass of one micro-batch: fewer with each stage of recomputation."""
    kept = [
        run_ranks(1, saved_bytes, small_config(shards, "unused", f"training.recompute={mode}"))[0]
        for mode in ("none", recompute)
    ]
    assert kept[1] < kept[0] if recompute != "none" else kept[1] == kept[0]


def saved_bytes(config: Config) -> int:
    mesh = meshes.cut(config)
    state = build_state(config, mesh)
    (batch, *_) = Loader(config.data.train, config=config, mesh=mesh).step(0)
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        state.chunks[0](batch)
    return sum(seen.values())


@pytest.mark.parametrize("text", ["", "tp=2 pp=2"])
def test_bf16_stays_near_fp32(text: str, shards: Path) -> None:
    (fp32,) = run_ranks(1, curve, small_config(shards, "unused"), 4)
    config = small_config(shards, "unused", "training.precision=bf16", *layout(text))
    for bf16 in run_ranks(4 if text else 1, curve, config, 4):
        for step in range(4):
            # 8 bits of mantissa: 0.4% an operation, averaged over thousands of tokens.
            assert bf16["losses"][step]["loss"] == pytest.approx(fp32["losses"][step]["loss"], rel=2e-3)
            assert bf16["grad_norms"][step] == pytest.approx(fp32["grad_norms"][step], rel=5e-2)
            assert all(gradient.dtype == torch.float32 for gradient in bf16["gradients"][step].values())


def test_micro_batches_of_several_samples_change_nothing(shards: Path) -> None:
    (alone,) = run_ranks(1, curve, small_config(shards, "unused"), 2)
    for size, text, ranks in ((4, "", 1), (2, "tp=2 pp=2", 4), (2, " ", 2)):
        config = small_config(shards, "unused", f"training.micro_batch_size={size}", *layout(text))
        for split in run_ranks(ranks, curve, config, 2):
            assert_same_curve(split, alone)


@pytest.mark.parametrize("text", ["tp=2 pp=2", "pp=2 vpp=2", " "])
def test_evaluation_is_the_same_in_every_layout(text: str, shards: Path, heldout: Path) -> None:
    overrides = [f"data.validation=[{heldout}]", "evaluation.samples=13"]
    (alone,) = run_ranks(1, evaluate_once, small_config(shards, "unused", *overrides))
    ranks = 4 if "tp" in text else 2
    for split in run_ranks(ranks, evaluate_once, small_config(shards, "unused", *overrides, *layout(text))):
        assert split == pytest.approx(alone, rel=1e-6)
    assert alone["loss"] == pytest.approx(np.log(320), abs=0.3), "an untrained model knows nothing"


def evaluate_once(config: Config) -> dict[str, float]:
    mesh = meshes.cut(config)
    state = build_state(config, mesh)
    before = [parameter.clone() for chunk in state.chunks for parameter in chunk.parameters()]
    losses = evaluate(state, Loader(config.data.validation, config=config, mesh=mesh))
    after = [parameter for chunk in state.chunks for parameter in chunk.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after))
    return by_name(losses)


def poison(weight: Tensor) -> RemovableHandle:
    """Make the gradient of `weight` not a number as it is computed, in the buffer that its product is added to."""

    def spoil(gradient: Tensor) -> None:
        weight.main_grad.fill_(float("nan"))

    return weight.register_hook(spoil)


def poisoned(config: Config) -> dict[str, Any]:
    """Train one good step, one with a gradient that is not a number, and one good step."""
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    state = build_state(config, mesh)
    updated, finite, same = [], [], []
    guard, said = Guard(config.guard), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron_mm").addHandler(handler)
    for step in range(3):
        hooks = []
        if step == 1 and mesh.rank == mesh.world_size - 1:
            hooks = [poison(state.chunks[-1].output_layer.weight)]
        before = [parameter.clone() for chunk in state.chunks for parameter in chunk.parameters()]
        result = train_step(state, loader.step(step))
        guard.check(result, step=step)
        updated.append(result.updated)
        after = [parameter for chunk in state.chunks for parameter in chunk.parameters()]
        finite.append(all(parameter.isfinite().all().item() for parameter in after))
        same.append(all(torch.equal(one, other) for one, other in zip(before, after)))
        for hook in hooks:
            hook.remove()
    return {"updated": updated, "finite": finite, "same": same, "said": said}


@pytest.mark.parametrize(("text", "ranks"), [("", 1), ("tp=2 pp=2", 4), ("", 2)])
def test_a_gradient_that_is_not_finite_changes_no_weight_and_is_named(text: str, ranks: int, shards: Path) -> None:
    for seen in run_ranks(ranks, poisoned, small_config(shards, "unused", *layout(text))):
        assert seen["updated"] == [True, False, True]
        assert all(seen["finite"])
        assert seen["same"][1]
        assert not seen["same"][2]
        (said,) = seen["said"]
        assert said.endswith(f"left as they were: rank {ranks - 1} in output_layer.weight")


def count(config: Config) -> int:
    return total_parameters(build_state(config, meshes.cut(config)))


def test_parameters_are_counted_once_in_every_layout(shards: Path) -> None:
    counts = {
        value
        for text, ranks in (("", 1), ("tp=2 pp=2", 4), ("pp=2 vpp=2", 2), ("tp=2", 4))
        for value in run_ranks(ranks, count, small_config(shards, "unused", *layout(text)))
    }
    assert len(counts) == 1


def groups(config: Config) -> list[tuple[float, float, int]]:
    state = build_state(config, meshes.cut(config))
    return [
        (group["wd_mult"], group["max_lr"], sum(p.numel() for p in group["params"]))
        for group in state.optimizer.param_groups
    ]


def test_parameters_are_treated_by_kind(shards: Path) -> None:
    overrides = [*TRAINED, "optimizer.encoder_lr_scale=0.5", "optimizer.lr=0.004"]
    (found,) = run_ranks(1, groups, small_config(shards, "unused", *overrides))
    assert {(decay, lr) for decay, lr, size in found if size} == {
        (1.0, 0.004),
        (0.0, 0.004),
        (1.0, 0.002),
        (0.0, 0.002),
    }


def overfit(config: Config) -> list[float]:
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    state = build_state(config, mesh)
    return [by_name(train_step(state, loader.step(0)).losses)["loss"] for _ in range(30)]


def test_one_batch_is_learned_by_heart(shards: Path) -> None:
    cheap = ["training.global_batch_size=2", "optimizer.lr=0.01", "training.steps=30", "schedule.decay_steps=10000"]
    config = small_config(shards, "unused", *cheap)
    (losses,) = run_ranks(1, overfit, config)
    assert losses[-1] < 0.7 * losses[0]
