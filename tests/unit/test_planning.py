"""The planner: which layouts there are, what they take, how their schedule runs, and what the tool says."""

import importlib.util
import itertools
import math
from collections.abc import Callable
from html import escape
from pathlib import Path

import pytest
from launch import run_alone
from small import layout as cut_as
from small import small_config

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.errors import ConfigError
from megatron_mm.planning import pictures
from megatron_mm.planning.cost import GPUS, Layout, matrices, step_time
from megatron_mm.planning.layouts import RATES, forecast, layouts, memory, overrides, plan, shape_of, with_layout
from megatron_mm.planning.ledger import Ledger, Sample
from megatron_mm.planning.rehearsal import RankReport, rehearse
from megatron_mm.planning.timeline import Durations, bubble, durations_of, order, schedule, waiting

ROOT = Path(__file__).parents[2]
BF16 = "training.precision=bf16"
H100 = GPUS["h100-80"]


def can_be_loaded(layout: Layout, gpus: int) -> bool:
    """Tell, by loading it as a user would, whether `tiny` runs in a layout."""
    cut = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp}
    settings = [f"parallel.{name}={size}" for name, size in cut.items()]
    try:
        config = configs.load("tiny", [BF16, *settings, f"training.micro_batch_size={layout.micro_batch_size}"])
        configs.check_world(config, gpus)
    except ConfigError:
        return False
    return True


def test_the_layouts_are_those_that_can_be_loaded() -> None:
    gpus, config = 8, configs.load("tiny", [BF16])
    obvious = set()
    for tp, pp, vpp, cp, size in itertools.product((1, 2, 4, 8), range(1, 9), range(1, 9), (1, 2), (1, 2, 4)):
        if gpus % (tp * pp * cp) == 0:
            batch = config.training.global_batch_size
            layout = Layout(tp, pp, vpp, cp, gpus // (tp * pp * cp), size, batch, "bf16")
            if can_be_loaded(layout, gpus):
                obvious.add(layout)
    found = list(layouts(config, gpus=gpus))
    assert len(found) == len(set(found)) == 3 * len(obvious) > 30
    assert {one for one in found if one.recompute == "none"} == obvious


def test_a_plans_overrides_make_its_layout() -> None:
    config = configs.load("mm_88b", [])
    for layout in list(layouts(config, gpus=1024))[::101]:
        assert configs.load("mm_88b", overrides(config, layout)) == with_layout(config, layout)


SCHEDULES = [(2, 1, 3), (4, 1, 8), (8, 1, 4), (2, 2, 4), (4, 7, 16), (8, 2, 16)]


@pytest.mark.parametrize(("pp", "vpp", "count"), SCHEDULES)
def test_a_schedule_runs_every_pass_after_what_it_needs(pp: int, vpp: int, count: int) -> None:
    durations = Durations([[1.0] * vpp] * pp, [[2.0] * vpp] * pp, send=0.25)
    passes = schedule(durations, num_micro_batches=count)
    at = {(one.backward, one.chunk * pp + one.stage, one.micro_batch): one for one in passes}
    assert len(at) == len(passes) == 2 * pp * vpp * count
    for (backward, place, number), one in at.items():
        assert one.end - one.start == (2.0 if backward else 1.0)
        if backward:
            assert one.start >= at[False, place, number].end
            assert place == pp * vpp - 1 or one.start >= at[True, place + 1, number].end + 0.25
        else:
            assert place == 0 or one.start >= at[False, place - 1, number].end + 0.25
    for stage in range(pp):
        own = sorted((one for one in passes if one.stage == stage), key=lambda one: one.start)
        assert all(before.end <= after.start for before, after in itertools.pairwise(own))


@pytest.mark.parametrize(("pp", "vpp", "count"), [one for one in SCHEDULES if one[2] >= one[0]])
def test_the_bubble_is_the_closed_formulas(pp: int, vpp: int, count: int) -> None:
    durations = Durations([[1.0] * vpp] * pp, [[2.0] * vpp] * pp, send=0.0)
    passes = schedule(durations, num_micro_batches=count)
    layout = Layout(1, pp, vpp, 1, 1, 1, count, "bf16")
    assert bubble(passes) == pytest.approx(layout.bubble)
    assert waiting(passes) == pytest.approx([layout.bubble / (1 + layout.bubble)] * pp)


def recorded_order(config: Config, rank: int, world_size: int) -> list[tuple[bool, int, int]]:
    """Return (backward, chunk, micro-batch) of the passes of a rank as megatron-core's schedule runs them."""
    from megatron.core.pipeline_parallel import schedules

    forward_step, backward_step = schedules.forward_step, schedules.backward_step
    seen, made = [], {}

    def only(tensor: object) -> object:
        return tensor[0] if isinstance(tensor, list) else tensor

    def forward(*args: object, **kwargs: object) -> tuple:
        output, tokens = forward_step(*args, **kwargs)
        chunk = kwargs.get("vp_stage") or 0
        number = sum(1 for backward, other, _ in seen if not backward and other == chunk)
        seen.append((False, chunk, number))
        made[id(only(output))] = only(output), chunk, number  # held, so that no other gets its id
        return output, tokens

    def backward(inputs: object, outputs: object, *args: object, **kwargs: object) -> object:
        _, chunk, number = made[id(only(outputs))]
        seen.append((True, chunk, number))
        return backward_step(inputs, outputs, *args, **kwargs)

    schedules.forward_step, schedules.backward_step = forward, backward
    rehearse(config, rank=rank, world_size=world_size, on="cpu")
    return seen


@pytest.mark.parametrize("text", ["pp=4", "pp=2 vpp=2"])
def test_the_order_is_that_which_megatron_core_runs(text: str) -> None:
    config = small_config("none", "none", *cut_as(text))
    parallel = config.parallel
    count = config.num_micro_batches(1)
    for stage in (0, parallel.pp - 1):
        expected = order(pp=parallel.pp, vpp=parallel.vpp, num_micro_batches=count, stage=stage)
        assert run_alone(recorded_order, config, stage, parallel.pp) == expected


def test_the_timeline_takes_what_the_step_time_says() -> None:
    config = configs.load("mm_88b", [])
    shape, layout = shape_of(config), Layout(8, 4, 7, 1, 32, 1, 512, "bf16")
    slots = {"embedding_slot": True, "loss_slot": True}
    passes = schedule(durations_of(shape, layout, H100, RATES[H100.name], **slots), num_micro_batches=16)
    time = step_time(shape, layout, H100, RATES[H100.name], state_bytes=config.optimizer.state_bytes)
    outside = time.data_communication + time.optimizer
    assert max(one.end for one in passes) == pytest.approx(time.total - outside, rel=0.03)


@pytest.mark.parametrize("encoders", ["trained", "frozen"])
def test_memory_and_flops_are_what_a_rehearsal_counts(encoders: str) -> None:
    frozen = ["image.trainable=false", "audio.trainable=false"] if encoders == "frozen" else []
    config = configs.load("mm_1b", ["parallel.tp=2", "parallel.pp=2", "training.global_batch_size=16", *frozen])
    extra, reports = run_alone(rehearsed_stages, config, 4)
    layout, shape = Layout(2, 2, 1, 1, 1, config.training.micro_batch_size, 16, "bf16"), shape_of(config)
    products = matrices(shape, layout)
    for stage, report in enumerate(reports):
        held = memory(shape, layout, **extra, state_bytes=config.optimizer.state_bytes, stage=stage)
        assert sum(held.values()) == pytest.approx(report.peak_bytes, rel=0.1)
        assert held["gradients"] == pytest.approx(report.peak["gradients"], rel=0.02)
        passes = 3 * report.num_layers * report.num_micro_batches
        for module, names in (("self_attention", ("query", "key_value", "projection")), ("mlp", ("fc1", "fc2"))):
            expected = passes * sum(2 * math.prod(products[name]) for name in names)
            assert report.flops_by_module()[module] == expected


def rehearsed_stages(config: Config, world_size: int) -> tuple[dict[str, int], list[RankReport]]:
    """Return the parameters of encoders and projectors, and the reports of a rank of both stages."""
    reports = [rehearse(config, rank=rank, world_size=world_size, media=0) for rank in (0, world_size // 2)]
    from megatron_mm.model.accounting import build_on_meta

    media = [
        parameter
        for name, parameter in build_on_meta(config).named_parameters()
        if name.startswith(("embedding.image.", "embedding.audio."))
    ]
    trained = sum(parameter.numel() for parameter in media if parameter.requires_grad)
    return {"extra_parameters": sum(parameter.numel() for parameter in media), "extra_trained": trained}, reports


def test_the_checkpoint_interval_wastes_least() -> None:
    config = configs.load("mm_88b", [])
    planned, _ = plan(config, gpus=1024, gpu=H100, extra_parameters=0, extra_trained=0)
    ahead = forecast(config, planned[0], gpus=1024, gpu=H100, parameters=88_000_000_000)
    between = ahead.hours_between_failures * 3600

    def waste(apart: float) -> float:
        return 60.0 / apart + apart / 2 / between

    best = min(range(60, 20_000, 10), key=waste)
    assert ahead.checkpoint_seconds_apart == pytest.approx(best, abs=10)
    lost = waste(ahead.checkpoint_seconds_apart) + 600.0 / between
    assert ahead.days_with_failures == pytest.approx(ahead.days / (1 - lost))


def test_a_long_history_is_thinned_but_keeps_its_peak_and_its_valleys() -> None:
    ledger = Ledger()
    ledger.forget_counts()
    sizes = [1000 + 37 * (number % 50) for number in range(5000)]
    sizes[1234], sizes[4321] = 9000, 1
    ledger.history = [Sample(number, "", {"weights": size}) for number, size in enumerate(sizes, 1)]
    kept = {sample.operators: sample.held["weights"] for sample in ledger.samples(most=400) if sample.held}
    assert 300 < len(kept) <= 400
    assert list(kept) == sorted(kept)
    assert kept[1235] == 9000 and kept[4322] == 1


def test_a_picture_of_memory_names_its_peak() -> None:
    held = [{"weights": 2**30}, {"weights": 2**30, "activations": 3 * 2**30}, {"weights": 2**30}]
    phases = "forward micro-batch 0 chunk 0", "backward micro-batch 0 chunk 0", "the optimizer step"
    history = [Sample(*one) for one in zip((0, 5, 9), phases, held)]
    drawn = pictures.as_svg(pictures.memory_over_a_step(history, "rank 0"))
    assert "peak 4.00 GiB, backward micro-batch 0 chunk 0" in drawn and "activations" in drawn
    assert drawn == pictures.as_svg(pictures.memory_over_a_step(history, "rank 0"))


def tool() -> Callable[[list[str]], int]:
    """Return the main function of tools/plan.py."""
    spec = importlib.util.spec_from_file_location("plan", ROOT / "tools" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", BF16, "--gpus", "0", "--gpu", "h100-80"], "0 GPUs are none"),
        (["tiny", BF16, "--gpus", "7", "--gpu", "h100-80"], "cannot be cut for 7 GPUs"),
        (["tiny", "--gpus", "8", "--gpu", "h100-80"], "training.precision=fp32 has no published runs"),
        (["mm_88b_fp8", "--gpus", "1024", "--gpu", "a100-80"], "a100-80 has no FP8"),
        (["mm_88b", "--gpus", "8", "--gpu", "a100-80"], "fits 8 a100-80. Use more GPUs"),
        (["tiny", "--gpus", "8", "--gpu", "h100-80", "--html", "/nowhere/x.html"], "/nowhere does not exist"),
        (["tiny", "--gpus", "8", "--gpu", "h100-80", "--timeline", "x.gif"], "end its name with one of .png"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(arguments: list[str], message: str) -> None:
    status, said = run_alone(told, arguments)
    assert (status, said.startswith("error: ")) == (2, True)
    assert message in said


def told(arguments: list[str]) -> tuple[int, str]:
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as said:
        return tool()(arguments), said.getvalue()


def written(folder: str) -> tuple[int, str]:
    import contextlib
    import io

    files = ["--html", f"{folder}/plan.html", "--timeline", f"{folder}/plan.png"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return tool()(["tiny", BF16, "--gpus", "8", "--gpu", "h100-80", "--rehearse", *files]), said.getvalue()


def test_the_tool_plans_rehearses_and_draws(tmp_path: Path) -> None:
    status, said = run_alone(written, str(tmp_path))
    assert status == 0
    assert "rehearsed TP" in said and "the fastest of" in said and "settings: " in said
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<svg") >= 2 and "over a step, rehearsed" in page
    assert said.splitlines()[-1] in page


def lines_of(preset: str, gpu: str) -> list[str]:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert tool()([preset, "--gpus", "1024", "--gpu", gpu]) == 0
    return said.getvalue().splitlines()


@pytest.mark.parametrize(
    ("preset", "gpu", "name"),
    [
        ("mm_88b", "a100-80", "mm_88b_1024_a100_bf16"),
        ("mm_88b", "h100-80", "mm_88b_1024_h100_bf16"),
        ("mm_88b_fp8", "h100-80", "mm_88b_1024_h100_fp8"),
    ],
)
def test_the_plans_in_the_examples_are_what_the_tool_says(preset: str, gpu: str, name: str) -> None:
    page = (ROOT / "examples" / "plans" / f"{name}.html").read_text()
    readme = " ".join((ROOT / "examples" / "plans" / "README.md").read_text().split())
    said = run_alone(lines_of, preset, gpu)
    for line in said:
        assert escape(line) in page
        assert line in readme or "parameters" in line
