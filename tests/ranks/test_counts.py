"""What a step says that it has seen, tokens by kind and losses by dataset, and what it leaves as it was."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import run_ranks
from small import TRAINED, layout, small_config, write_shards
from test_layouts import full_gradients

from megatron_mm.batch import MicroBatch, TokenCounts
from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import mesh as meshes
from megatron_mm.model.initialize import name_in_whole_model
from megatron_mm.model.loss import by_name
from megatron_mm.training import checkpoints, loop
from megatron_mm.training.evaluate import evaluate
from megatron_mm.training.metrics import read_metrics
from megatron_mm.training.state import TrainState, build_state
from megatron_mm.training.step import train_step

LAYOUTS = [("tp=2", 2), ("pp=2", 2), ("", 2), ("cp=2", 2), ("tp=2 pp=2", 4), ("tp=2 cp=2", 4), ("pp=2 vpp=2", 4)]


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two datasets of one tokenizer: documents of every kind, and texts alone."""
    folder = tmp_path_factory.mktemp("blend")
    return [write_shards(folder, "mixed", seed=1), write_shards(folder, "texts", seed=2, text_only=True)]


def blended(datasets: list[Path], *overrides: str) -> Config:
    mixed, texts = datasets
    return small_config(mixed, "unused", f"data.train={{{mixed}: 0.5, {texts}: 0.5}}", *overrides)


def count_steps(config: Config) -> list[dict[str, Any]]:
    """Return what two steps say that they have seen."""
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    state = build_state(config, mesh)
    results = [train_step(state, loader.step(step)) for step in range(2)]
    return [{"counts": result.counts, "losses": by_name(result.losses, datasets=loader.datasets)} for result in results]


def expected_counts(config: Config) -> list[TokenCounts]:
    """Count the tokens of the two steps by their ids."""
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    ids, counts = loader.special_ids, []
    for step in range(2):
        batches = loader.step(step)
        tokens = torch.cat([batch.tokens for batch in batches])
        of = {name: int((tokens == ids[name]).sum()) for name in ("image", "audio", "pad")}
        loss = int(sum(batch.loss_mask.sum() for batch in batches))
        counts.append(TokenCounts.of([len(tokens) - sum(of.values()), *of.values(), loss]))
    return counts


@pytest.fixture(scope="module")
def alone(blend: list[Path]) -> list[dict[str, Any]]:
    (seen,) = run_ranks(1, count_steps, blended(blend))
    return seen


def test_every_position_is_counted_once_as_what_it_is(blend: list[Path], alone: list[dict[str, Any]]) -> None:
    (expected,) = run_ranks(1, expected_counts, blended(blend))
    assert [step["counts"] for step in alone] == expected
    for step in alone:
        counts = step["counts"]
        assert counts.tokens + counts.padding == blended(blend).tokens_per_step
        assert min(counts.numbers) > 0
        assert counts.loss < counts.text + 2 * counts.padding, "placeholders bear no loss"


def test_losses_are_told_by_source_and_by_dataset(blend: list[Path], alone: list[dict[str, Any]]) -> None:
    losses = alone[0]["losses"]
    mixed, texts = (f"loss/dataset/{prefix}" for prefix in blend)
    assert {mixed, texts, "loss/text", "loss/image"} <= losses.keys()
    assert min(losses[mixed], losses[texts]) < losses["loss"] < max(losses[mixed], losses[texts])


@pytest.mark.parametrize(("text", "ranks"), LAYOUTS)
def test_counts_and_losses_by_dataset_are_those_of_one_rank(
    text: str, ranks: int, blend: list[Path], alone: list[dict[str, Any]]
) -> None:
    for split in run_ranks(ranks, count_steps, blended(blend, *layout(text))):
        for ours, theirs in zip(split, alone, strict=True):
            assert ours["counts"] == theirs["counts"]
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)


def whole_state(state: TrainState) -> dict[str, torch.Tensor]:
    """Return this rank's parameters, main parameters and moments, by name in the whole model."""
    seen = {}
    (optimizer,) = state.optimizer.chained_optimizers
    for chunk in state.chunks:
        for name, parameter in chunk.named_parameters():
            name = name_in_whole_model(chunk, name)
            seen[name] = parameter.detach().clone()
            if parameter in optimizer.model_param_group_index_map:
                states = optimizer._get_main_param_and_optimizer_states(parameter)
                seen |= {f"{name} {kind}": value.detach().clone() for kind, value in states.items()}
    return seen


def learn_texts(config: Config) -> dict[str, Any]:
    """Take a step over everything, then three over texts alone, whose last gradients are looked at too."""
    mesh = meshes.cut(config)
    state = build_state(config, mesh)
    mixed = Loader(config.data.train, config=config, mesh=mesh)
    texts = Loader(config.data.validation, config=config, mesh=mesh)
    train_step(state, mixed.step(0))
    before = whole_state(state)
    results = [train_step(state, texts.step(step)) for step in range(3)]
    gradients = full_gradients(state)
    after = whole_state(state)
    train_step(state, mixed.step(1))
    return {
        "changed": {name for name, value in before.items() if not torch.equal(value, after[name])},
        "names": set(before),
        "moved again": {name for name, value in whole_state(state).items() if not torch.equal(value, after[name])},
        "counts": [result.counts for result in results],
        "gradients": {name for name, gradient in gradients.items() if gradient.any()},
        "losses": [by_name(result.losses)["loss"] for result in results],
    }


def of_media(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(("embedding.image.", "embedding.audio."))}


@pytest.mark.parametrize(
    ("text", "ranks", "precision"),
    [("", 1, "fp32"), ("tp=2", 2, "fp32"), ("pp=2", 2, "fp32"), ("", 2, "fp32"), ("tp=2 pp=2", 4, "bf16")],
)
def test_texts_alone_leave_encoders_and_projectors_bit_for_bit(
    text: str, ranks: int, precision: str, blend: list[Path]
) -> None:
    mixed, texts = blend
    settings = [*TRAINED, f"data.validation=[{texts}]", f"training.precision={precision}", *layout(text)]
    seen = run_ranks(ranks, learn_texts, small_config(mixed, "unused", *settings))
    assert of_media(set.union(*(rank["names"] for rank in seen)))
    for rank in seen:
        assert all(not any(counts.media.values()) for counts in rank["counts"])
        assert not of_media(rank["changed"])
        assert not of_media(rank["gradients"])
        decoder = {name for name in rank["names"] if name.startswith("decoder.")}
        assert decoder <= rank["changed"]
        # The step with media moves them again; the keys' biases of Wav2Vec2 and others have no gradient but rounding.
        assert len(of_media(rank["moved again"])) >= 0.9 * len(trained_media(rank["names"]))
    assert seen[0]["losses"][2] < seen[0]["losses"][0]


def trained_media(names: set[str]) -> set[str]:
    """Parameters that the optimizer has a share of on this rank, and their moments."""
    return {name for name in of_media(names) if " " in name}


def without_loss(batch: MicroBatch) -> MicroBatch:
    counts = dataclasses.replace(batch.counts, loss=0)
    return dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask), counts=counts)


def train_around_nothing(config: Config, empty: list[int]) -> dict[str, Any]:
    """Train as the command does, with batches of which no token bears loss at the steps `empty`, counted from 1."""
    mesh = meshes.cut(config)
    said, states = [], []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron_mm").addHandler(handler)
    loop.plot_losses = lambda run_dir: run_dir

    def step(state: TrainState, batches: list[MicroBatch]) -> Any:
        before = whole_state(state) if state.step + 1 in empty else {}
        result = train_step(state, [without_loss(batch) for batch in batches] if before else batches)
        after = whole_state(state) if before else {}
        states.append(all(torch.equal(value, after[name]) for name, value in before.items()))
        return result

    loop.train_step = step
    state = loop.train(config, mesh)
    return {"same": all(states), "step": state.step, "said": said, "weights": whole_state(state)}


def run_of(shards: Path, run_dir: Path, *overrides: str) -> Config:
    cheap = ("training.global_batch_size=2", "training.steps=5", "checkpoint.interval=1", "guard.max_skipped_steps=2")
    return small_config(shards, run_dir, *cheap, *TRAINED, *overrides)


@pytest.mark.parametrize(("text", "ranks"), [("", 1), ("tp=2 pp=2", 4), ("", 2)])
def test_a_batch_without_loss_changes_nothing_and_has_no_loss(
    text: str, ranks: int, shards: Path, tmp_path: Path
) -> None:
    config = run_of(shards, tmp_path, "checkpoint.keep=9", *layout(text))
    for number, seen in enumerate(run_ranks(ranks, train_around_nothing, config, [1, 3, 4])):
        assert seen["same"]
        assert seen["step"] == 5
        told = [f"step {step}: no token of its batch bears loss" for step in (1, 3, 4)] if number == 0 else []
        assert [line.partition(";")[0] for line in seen["said"]] == told
    steps = [record for record in read_metrics(tmp_path) if "grad_norm" in record]
    assert [record["loss"] is None for record in steps] == [True, False, True, True, False]
    assert [record["updated"] for record in steps] == [False, True, False, False, True]
    assert steps[3]["loss_tokens"] == steps[1]["loss_tokens"] > steps[0]["loss_tokens"] == 0
    assert steps[3]["text_tokens"] > steps[1]["text_tokens"]
    assert not any(name.startswith("loss/") for record in (steps[0], steps[2]) for name in record)
    saved = sorted(path.name for path in checkpoints.folder(config).glob("step_*"))
    assert saved == [f"step_{step:08d}" for step in range(1, 6)], "a state that was left as it was is as good as before"


def test_a_run_goes_on_from_what_a_batch_without_loss_left(shards: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    (expected,) = run_ranks(1, train_around_nothing, run_of(shards, whole), [1])
    run_ranks(1, train_around_nothing, run_of(shards, stopped, "training.stop_after=1"), [1])
    (seen,) = run_ranks(1, train_around_nothing, run_of(shards, stopped), [])
    for name, value in expected["weights"].items():
        assert torch.equal(seen["weights"][name], value), name


KINDS = ("text", "image", "audio", "padding", "loss")


def totals(run_dir: Path) -> list[list[int]]:
    records = [record for record in read_metrics(run_dir) if "grad_norm" in record]
    return [[record[f"{kind}_tokens"] for kind in KINDS] for record in records]


def test_counts_go_on_over_restarts_and_say_what_they_lack(shards: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_ranks(1, train_around_nothing, run_of(shards, whole), [])
    run_ranks(1, train_around_nothing, run_of(shards, stopped, "training.stop_after=3"), [])
    run_ranks(2, train_around_nothing, run_of(shards, stopped, "training.stop_after=4"), [])
    assert totals(stopped) == totals(whole)[:4]
    (stopped / "metrics.jsonl").unlink()
    (seen,) = run_ranks(1, train_around_nothing, run_of(shards, stopped), [])
    (last,) = totals(stopped)
    assert last == [end - before for end, before in zip(totals(whole)[4], totals(whole)[3])]
    assert f"{stopped}/metrics.jsonl has no token counts of the 4 steps up to 4" in seen["said"][0]
    assert read_metrics(stopped)[0]["uncounted_steps"] == 4


def evaluate_once(config: Config) -> dict[str, Any]:
    mesh = meshes.cut(config)
    state = build_state(config, mesh)
    loader = Loader(config.data.validation, config=config, mesh=mesh, report_apart=True)
    losses = evaluate(state, loader)
    return {"losses": by_name(losses, datasets=loader.datasets), "tokens": losses.sum(dim=1)[:, 1].tolist()}


@pytest.mark.parametrize("text", ["tp=2 pp=2", "pp=2 vpp=2", "cp=2"])
def test_each_held_out_dataset_is_evaluated_and_told_in_every_layout(
    text: str, shards: Path, blend: list[Path]
) -> None:
    both = f"data.validation=[{','.join(map(str, blend))}]"
    few = [both, "evaluation.samples=9"]  # fewer than the first dataset alone has
    (whole,) = run_ranks(1, evaluate_once, small_config(shards, "unused", both))
    (alone,) = run_ranks(1, evaluate_once, small_config(shards, "unused", *few))
    names = {f"loss/dataset/{prefix}" for prefix in blend}
    assert names <= alone["losses"].keys()
    assert sum(alone["tokens"]) < 0.7 * sum(whole["tokens"])
    share = [seen["tokens"][1] / sum(seen["tokens"]) for seen in (alone, whole)]
    assert share[0] == pytest.approx(share[1], abs=0.15)
    config = small_config(shards, "unused", *few, *layout(text))
    for split in run_ranks(4 if "tp" in text else 2, evaluate_once, config):
        assert split["tokens"] == alone["tokens"]
        assert split["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def evaluate_nothing(config: Config) -> dict[str, float]:
    mesh = meshes.cut(config)
    state = build_state(config, mesh)
    loader = Loader(config.data.validation, config=config, mesh=mesh, report_apart=True)
    read = loader.micro_batches
    loader.micro_batches = lambda samples: [without_loss(batch) for batch in read(np.asarray(samples))]
    return by_name(evaluate(state, loader), datasets=loader.datasets)


def test_an_evaluation_without_loss_has_none(shards: Path, blend: list[Path]) -> None:
    config = small_config(shards, "unused", f"data.validation=[{blend[1]}]", "evaluation.samples=8")
    assert run_ranks(1, evaluate_nothing, config) == [{}]
