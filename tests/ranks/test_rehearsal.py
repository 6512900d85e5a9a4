"""A rehearsed rank holds and sends what the real one does, and fails where it would."""

import contextlib
import importlib.util
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_alone, run_ranks
from small import layout, small_config
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mm.config import Config
from megatron_mm.engine import mesh as meshes
from megatron_mm.planning.ledger import Ledger
from megatron_mm.planning.rehearsal import (
    RankReport,
    RehearsalFailed,
    check_messages,
    distinct_ranks,
    prepare,
    rehearse,
    report_of,
    take_step,
)
from megatron_mm.planning.rehearsal import micro_batch as synthetic
from megatron_mm.training import checkpoints
from megatron_mm.training.state import build_state
from megatron_mm.training.step import update

WIDER = ("model.hidden_size=64", "model.ffn_hidden_size=192", "training.precision=bf16")


def real_step(config: Config) -> RankReport:
    mesh = meshes.cut(config)
    ledger = Ledger()
    with ledger:
        state = prepare(config, mesh, ledger)
        count = config.num_micro_batches(mesh.dp_size)
        take_step(state, [synthetic(config, mesh, media=1) for _ in range(count)], ledger)
    return report_of(state, ledger, seconds=0.0)


def rehearsed_step(config: Config, rank: int, world_size: int, on: str, media: int = 1) -> RankReport:
    return rehearse(config, rank=rank, world_size=world_size, on=on, media=media)


def sent(report: RankReport) -> Counter:
    """Bytes by group; a fake group spells some collectives otherwise."""
    result: Counter[tuple[str, int]] = Counter()
    for collective, count in report.collectives.items():
        result[collective.group.removesuffix("_GLOO"), collective.size] += collective.num_bytes * count
    return result


@pytest.mark.parametrize("text", ["tp=2 pp=2", "pp=2 vpp=2", "cp=2"])
def test_a_rehearsed_rank_holds_and_sends_what_the_real_one_does(text: str) -> None:
    world_size = 2 if "vpp" in text else 4  # cp=2 over four ranks has two data-parallel ones
    config = small_config("none", "none", *layout(text), *WIDER)
    real = run_ranks(world_size, real_step, config)
    check_messages(real)
    for rank in (0, world_size - 1):
        rehearsed = run_alone(rehearsed_step, config, rank, world_size, "cpu")
        assert sent(rehearsed) == sent(real[rank])
        assert sum(rehearsed.flops.values()) == sum(real[rank].flops.values()) > 0
        assert sum(rehearsed.peak.values()) == pytest.approx(sum(real[rank].peak.values()), rel=0.02)
        assert rehearsed.parameters == real[rank].parameters
        assert rehearsed.peak_phase == next(s.phase for s in rehearsed.history if s.held == rehearsed.peak)
        assert rehearsed.peak_phase.startswith("backward micro-batch")


def test_a_rehearsal_fails_where_the_job_would_and_names_rank_and_module() -> None:
    assert "rank 1 of 2 (pp 1" in (message := run_alone(failing_message, "loss"))
    assert "fails in forward micro-batch 0 chunk 0, in the loss: RuntimeError: sizes do not match" in message
    assert "rank 1 of 2 (pp 1" in (message := run_alone(failing_message, "forward"))
    place = "micro-batch 2 chunk 0, in mlp.activation_func of decoder layer 5 of 6: RuntimeError: "
    assert f"fails in forward {place}" in message
    assert "rank 1 of 2 (pp 1" in (message := run_alone(failing_message, "backward"))
    assert f"fails in backward {place}" in message
    assert "rank 1 of 2 (pp 1" in (message := run_alone(failing_message, "recomputed"))
    assert f"fails in backward {place}" in message


class _Misshapen(torch.autograd.Function):
    """The identity, of which the forward or the backward pass multiplies what does not fit."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, where: str) -> torch.Tensor:
        ctx.where = where
        return inputs @ inputs if where != "backward" else inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return gradient @ gradient, None


def test_messages_that_do_not_match_are_named() -> None:
    config = small_config("none", "none", *layout("pp=2"), *WIDER)
    reports = [run_alone(rehearsed_step, config, rank, 2, "cpu") for rank in range(2)]
    check_messages(reports)
    narrow = small_config("none", "none", *layout("pp=2"), *WIDER, "model.hidden_size=32")
    reports[1] = run_alone(rehearsed_step, narrow, 1, 2, "cpu")
    sides = "rank 0 has send of 32,768 bytes in forward micro-batch 0 chunk 0 and rank 1 has recv of 16,384 bytes in"
    with pytest.raises(RehearsalFailed, match=f"message 0 over .* of ranks 0, 1 differs: {sides}"):
        check_messages(reports)
    reports[1].messages.clear()
    with pytest.raises(RehearsalFailed, match="rank 1 has none"):
        check_messages(reports)


def failing_message(where: str) -> str:
    """Return how a rehearsal ends whose loss, or whose fifth layer's MLP in the third micro-batch, is broken."""
    from unittest import mock

    from megatron_mm.model import layer, multimodal

    swiglu, count = layer.SwiGLU.forward, 0

    def break_one(module: torch.nn.Module, gate_and_up: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        outputs = swiglu(module, gate_and_up)
        # The stage has layers 4, 5 and 6; recomputed, they come twice a micro-batch, the second time from behind.
        return _Misshapen.apply(outputs, where) if count == (17 if where == "recomputed" else 8) else outputs

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("sizes do not match")

    recompute = "full" if where == "recomputed" else "none"
    config = small_config("none", "none", *layout("pp=2"), *WIDER, f"training.recompute={recompute}")
    target = (multimodal, "vocab_parallel_cross_entropy", broken)
    if where != "loss":
        target = (layer.SwiGLU, "forward", break_one)
    try:
        with mock.patch.object(*target):
            rehearse(config, rank=1, world_size=2)
    except RehearsalFailed as error:
        return str(error)
    return ""


def saved_bytes(config: Config) -> tuple[int, int]:
    """Return the bytes that this rank plans to save, and those of all tensors in the checkpoint of all ranks."""
    mesh = meshes.cut(config)
    state = build_state(config, mesh)
    update(state)
    index = FileSystemReader(checkpoints.save(state)).read_metadata()
    tensors = [entry for entry in index.state_dict_metadata.values() if isinstance(entry, TensorStorageMetadata)]
    return checkpoints.planned_bytes(state), sum(one.size.numel() * one.properties.dtype.itemsize for one in tensors)


@pytest.mark.parametrize("text", ["", "tp=2", "pp=2"])
def test_the_checkpoint_plan_is_what_is_saved(text: str, tmp_path: Path) -> None:
    config = small_config("none", tmp_path, *layout(text), *WIDER)
    seen = run_ranks(2, saved_bytes, config)
    assert sum(planned for planned, _ in seen) == seen[0][1]
    for rank, (planned, _) in enumerate(seen):
        assert run_alone(rehearsed_step, config, rank, 2, "cpu").checkpoint_bytes == planned


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_rehearsed_flops_are_those_of_the_formula(recompute: str) -> None:
    config = small_config("none", "none", *WIDER, f"training.recompute={recompute}", "training.global_batch_size=2")
    flops = run_alone(rehearsed_step, config, 0, 1, "gpu", 0).flops_by_module()
    model, tokens = config.model, config.tokens_per_step
    heads, groups = (count * model.head_dim for count in (model.num_attention_heads, model.num_query_groups))
    mlp_passes, attention_passes = {"none": (3, 3), "mlp": (4, 3), "full": (4, 4)}[recompute]
    per_layer = 2 * tokens * model.num_layers  # of a multiply and an add
    assert flops["mlp"] == mlp_passes * per_layer * 3 * model.hidden_size * model.ffn_hidden_size
    assert flops["self_attention"] == attention_passes * per_layer * model.hidden_size * (2 * heads + 2 * groups)
    assert flops["output_layer"] == 3 * 2 * tokens * model.hidden_size * model.vocab_size
    # Scores and their sum over values, causal; backward recomputes the scores and has four products more.
    attention = tokens * model.num_layers * heads * config.data.seq_len // 2
    assert flops["core_attention"] == (4 * (attention_passes - 2) + 10) * attention


def tool_says(arguments: list[str]) -> tuple[int, str, str]:
    """Return (status, output, errors) of tools/rehearse.py."""
    path = Path(__file__).parents[2] / "tools" / "rehearse.py"
    spec = importlib.util.spec_from_file_location("rehearse_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        return module.main(arguments), out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "0"], "--world-size 0: a job has 1 rank or more"),
        (["--world-size", "4", "--ranks", "x"], "--ranks x: give distinct, stages, all, or numbers"),
        (["--world-size", "4", "--ranks", "4"], "--ranks [4] are none of the 4 ranks. Use 0 to 3."),
        (["--world-size", "3", "parallel.tp=2"], "3 ranks cannot be cut"),
        (["--world-size", "4", "--json", "/nowhere/x.json"], "/nowhere does not exist. Make it first."),
    ],
)
def test_a_mistake_is_told_without_a_traceback(arguments: list[str], message: str) -> None:
    status, _, said = tool_says(["tiny", *arguments])
    assert status == 2
    assert said.startswith("error: ")
    assert message in said


def test_the_tool_writes_what_a_rank_holds(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "held.json"), "--html", str(tmp_path / "held.html")]
    status, said, _ = tool_says(["tiny", "--world-size", "2", "--ranks", "1", *files])
    assert status == 0
    assert said.startswith("rank 1 (pp 0, dp 1")
    (record,) = json.loads((tmp_path / "held.json").read_text())
    assert max(sum(point["held"].values()) for point in record["history"]) == pytest.approx(
        sum(record["peak"].values()), rel=0.01
    )
    assert (tmp_path / "held.html").read_text().count("<svg") == 2


def test_ranks_are_distinct_by_stage_and_by_who_reports_the_loss() -> None:
    config = small_config("none", "none", *layout("tp=2 pp=2"))
    assert distinct_ranks(config, 16) == [0, 8, 9]
