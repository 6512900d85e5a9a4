"""A rehearsed rank holds and sends what the real one does, and fails where it would."""

from collections import Counter

import pytest
from launch import run_alone, run_ranks
from small import layout, small_config

from megatron_mm.config import Config
from megatron_mm.parallel import mesh as meshes
from megatron_mm.planning.ledger import Ledger
from megatron_mm.planning.rehearsal import RankReport, distinct_ranks, prepare, rehearse, report_of, take_step
from megatron_mm.planning.rehearsal import micro_batch as synthetic

WIDER = ("model.hidden_size=64", "model.ffn_hidden_size=192", "training.precision=bf16")


def real_step(config: Config) -> RankReport:
    mesh = meshes.cut(config)
    ledger = Ledger()
    with ledger:
        state = prepare(config, mesh, ledger)
        count = config.num_micro_batches(mesh.dp_size)
        take_step(state, [synthetic(config, mesh, media=1) for _ in range(count)], ledger)
    return report_of(state, ledger, seconds=0.0)


def rehearsed_step(config: Config, rank: int, world_size: int, on: str) -> RankReport:
    return rehearse(config, rank=rank, world_size=world_size, on=on)


def sent(report: RankReport) -> Counter:
    """Bytes by group; a fake group spells some collectives otherwise."""
    result: Counter[tuple[str, int]] = Counter()
    for collective, count in report.collectives.items():
        result[collective.group.removesuffix("_GLOO"), collective.size] += collective.num_bytes * count
    return result


@pytest.mark.parametrize("text", ["tp=2 pp=2", "pp=2 vpp=2", "cp=2"])
def test_a_rehearsed_rank_holds_and_sends_what_the_real_one_does(text: str) -> None:
    world_size = 4 if text.count("2") == 2 and "vpp" not in text else 2
    config = small_config("none", "none", *layout(text), *WIDER)
    real = run_ranks(world_size, real_step, config)
    for rank in (0, world_size - 1):
        rehearsed = run_alone(rehearsed_step, config, rank, world_size, "cpu")
        assert sent(rehearsed) == sent(real[rank])
        assert sum(rehearsed.flops.values()) == sum(real[rank].flops.values()) > 0
        assert sum(rehearsed.peak.values()) == pytest.approx(sum(real[rank].peak.values()), rel=0.02)
        assert rehearsed.parameters == real[rank].parameters


def test_a_rehearsal_fails_where_the_job_would_and_names_rank_and_module() -> None:
    message = run_alone(failing_message)
    assert "rank 1 of 2 (pp 1" in message and "fails in loss: RuntimeError: sizes do not match" in message


def failing_message() -> str:
    from unittest import mock

    from megatron_mm.model import multimodal

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("sizes do not match")

    config = small_config("none", "none", *layout("pp=2"), *WIDER)
    try:
        with mock.patch.object(multimodal, "vocab_parallel_cross_entropy", broken):
            rehearse(config, rank=1, world_size=2)
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_are_distinct_by_stage_and_by_who_reports_the_loss() -> None:
    config = small_config("none", "none", *layout("tp=2 pp=2"))
    assert distinct_ranks(config, 16) == [0, 8, 9]
