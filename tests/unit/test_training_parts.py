"""The optimizer, the guard and the metrics, each alone."""

import copy
import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import small_config

from megatron_mm import config as configs
from megatron_mm.batch import TokenCounts
from megatron_mm.config import Config
from megatron_mm.config.schema import GuardConfig
from megatron_mm.errors import ConfigError
from megatron_mm.model.loss import by_name
from megatron_mm.optimizers.adamw import AdamW
from megatron_mm.source import Source
from megatron_mm.training.evaluate import spread
from megatron_mm.training.guard import Guard, LossSpike, TrainingDiverged
from megatron_mm.training.metrics import _forget_after, read_metrics, step_line
from megatron_mm.training.optimizer import RuleOptimizer, build_scheduler, is_decayed
from megatron_mm.training.step import StepResult


def adamw(groups: list[dict]) -> RuleOptimizer:
    """Return the rule of AdamW over parameter groups."""
    return RuleOptimizer(groups, AdamW().rules()[0], lr=0.01, weight_decay=0.1)


def test_adamw_is_torchs() -> None:
    torch.manual_seed(0)
    shapes = [(5, 3), (7,), (2, 2, 2)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = adamw([{"params": ours[:2]}, {"params": ours[2:], "weight_decay": 0.0}])
    reference = torch.optim.AdamW([{"params": theirs[:2]}, {"params": theirs[2:], "weight_decay": 0.0}], **settings)
    for step in range(20):
        for mine, other in zip(ours, theirs):
            mine.grad = torch.randn_like(mine) * (step + 1)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert [group["step"] for group in optimizer.param_groups] == [20, 20]


def test_adamw_divides_gradients_once_where_clipping_asks_it_to() -> None:
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(5, 3))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizer, reference = adamw([{"params": [ours]}]), adamw([{"params": [theirs]}])
    for divisor in (4.0, 1.0, 2.5):
        ours.grad = torch.randn(5, 3)
        theirs.grad = ours.grad / divisor
        if divisor != 1.0:  # the divisor of one step is not that of the next
            optimizer.gradient_divisor = divisor
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_fused_adamw_that_is_installed_takes_the_place_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import optimizer as mcore

    rule = AdamW(beta1=0.8, beta2=0.9, epsilon=1e-7, lr=0.2, weight_decay=0.3).rules()[0]
    assert rule.fused([]) is None
    seen: dict[str, object] = {}
    stand_in = type("FusedAdam", (), {"__init__": lambda self, groups, **own: seen.update(own, groups=groups)})
    stand_in.__module__ = "transformer_engine.pytorch.optimizers.fused_adam"
    monkeypatch.setattr(mcore, "Adam", stand_in)
    groups = [{"params": []}]
    assert isinstance(rule.fused(groups), stand_in)
    assert seen.pop("groups") is groups
    assert seen == {"lr": 0.2, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-7, "adam_w_mode": True}


def test_adamw_goes_on_from_its_saved_state() -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4))
    gradients = [torch.randn(4) for _ in range(6)]

    def run(optimizer: RuleOptimizer, parameter: torch.nn.Parameter, part: list[torch.Tensor]) -> None:
        for gradient in part:
            parameter.grad = gradient
            optimizer.step()

    first = adamw([{"params": [parameter]}])
    run(first, parameter, gradients[:3])
    twin = torch.nn.Parameter(parameter.detach().clone())
    second = adamw([{"params": [twin]}])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(first, parameter, gradients[3:])
    run(second, twin, gradients[3:])
    assert torch.equal(parameter, twin)


@pytest.mark.parametrize(
    ("name", "shape", "decayed"),
    [
        ("decoder.layers.0.self_attention.linear_q.weight", (4, 4), True),
        ("decoder.layers.0.mlp.linear_fc1.weight", (8, 4), True),
        ("output_layer.weight", (16, 4), True),
        ("embedding.image.projector.linear_1.weight", (4, 4), True),
        ("embedding.audio.encoder.tower.feature_extractor.conv_layers.0.conv.weight", (4, 1, 10), True),
        ("embedding.word_embeddings.weight", (16, 4), False),
        ("decoder.layers.0.input_layernorm.weight", (4,), False),
        ("embedding.image.projector.linear_1.bias", (4,), False),
        ("embedding.text_type_embedding", (4,), False),
        ("embedding.image.encoder.tower.embeddings.cls_token", (1, 1, 4), False),
        ("embedding.image.encoder.tower.embeddings.position_embeddings", (1, 197, 4), False),
        (
            "embedding.audio.encoder.tower.encoder.pos_conv_embed.conv.parametrizations.weight.original0",
            (1, 1, 8),
            False,
        ),
    ],
)
def test_matrices_are_decayed_and_nothing_else(name: str, shape: tuple[int, ...], decayed: bool) -> None:
    assert is_decayed(torch.empty(shape), name, decay_embeddings=False) == decayed


def test_embeddings_are_decayed_on_request() -> None:
    assert is_decayed(torch.empty(16, 4), "module.embedding.word_embeddings.weight", decay_embeddings=True)


def result(updated: bool = True, loss: float = 1.0) -> StepResult:
    losses = torch.tensor([[loss, 1.0]] + [[0.0, 0.0]] * (len(Source) - 1), dtype=torch.float64)
    return StepResult(losses, math.inf if not updated else 1.0, 1e-3, updated)


def test_the_guard_stops_a_run_whose_gradients_stay_non_finite() -> None:
    settings = GuardConfig(max_skipped_steps=4)
    guard = Guard(settings)
    for step in range(3):
        guard.check(result(False), step=step)
    assert not guard.healthy
    guard.check(result(True), step=20)
    assert guard.healthy
    for step in range(3):
        guard.check(result(False), step=30 + step)
    with pytest.raises(TrainingDiverged, match="the last 4 steps, up to 50"):
        guard.check(result(False), step=50)


def nothing() -> StepResult:
    """What a step over a batch without a loss-bearing token did."""
    return StepResult(torch.zeros(1, len(Source), 2, dtype=torch.float64), 0.0, 1e-3, False)


def test_a_step_without_loss_tells_the_guard_nothing() -> None:
    guard = Guard(GuardConfig(max_skipped_steps=2, spike_window=4, spike_steps=2))
    for step in range(8):
        guard.check(nothing(), step=step)
        assert guard.healthy
    for step in range(4):
        guard.check(result(loss=4.0 + 0.01 * step), step=8 + step)
    guard.check(nothing(), step=12)  # neither a loss of zero that lowers the median nor one that ends a spike
    guard.check(result(loss=9.0), step=13)
    guard.check(nothing(), step=14)
    assert not guard.healthy
    with pytest.raises(LossSpike, match=r"up to 9\.0000; it was 4\.0\d+ before"):
        guard.check(result(loss=9.0), step=15)
    guard = Guard(GuardConfig(max_skipped_steps=2))
    guard.check(result(False), step=1)
    guard.check(nothing(), step=2)
    with pytest.raises(TrainingDiverged):
        guard.check(result(False), step=3)


def test_the_guard_calls_it_a_spike_when_the_loss_stays_up() -> None:
    guard = Guard(GuardConfig(spike_window=20, spike_steps=3, spike_deviations=5.0))
    noise = [0.01 * math.sin(17 * step) for step in range(40)]
    for step in range(20):
        guard.check(result(loss=4.0 - 0.02 * step + noise[step]), step=step)
    guard.check(result(loss=9.0), step=20)
    assert not guard.healthy  # nothing is saved while it is not known whether this passes
    guard.check(result(loss=3.6), step=21)
    assert guard.healthy
    guard.check(result(loss=9.0), step=22)
    guard.check(result(loss=8.0), step=23)
    with pytest.raises(LossSpike, match=r"steps 22 to 24 is up to 9\.0000; it was 3\.\d+ before") as spike:
        guard.check(result(loss=7.0), step=24)
    assert (spike.value.first, spike.value.last) == (22, 24)
    for _ in range(GuardConfig().max_rollbacks):
        guard.roll_back(spike.value)
    with pytest.raises(TrainingDiverged, match="after 3 roll-backs"):
        guard.roll_back(spike.value)


def test_a_planned_change_is_no_spike_and_what_is_usual_is_learned_anew() -> None:
    """Harder data from step 41 on: with its past the guard would go back again and again."""
    guard = Guard(GuardConfig(spike_window=20, spike_steps=3))
    for step in range(1, 41):
        guard.check(result(loss=2.0 + 0.001 * (step % 3)), step=step)
    for step in range(41, 61):
        guard.check(result(loss=3.5 + 0.001 * (step % 3)), step=step, since=40)
        assert guard.healthy
    with pytest.raises(LossSpike):
        for step in range(61, 64):
            guard.check(result(loss=4.5), step=step, since=40)
    guard.remember([(step, 2.0) for step in range(31, 41)])
    guard.check(result(loss=3.5), step=41, since=40)
    assert guard.healthy


def test_the_limit_of_a_steady_loss_has_a_floor_in_nats() -> None:
    """A loss of 0.01 that becomes 0.06 is fifty deviations above, and nothing to go back for."""
    guard = Guard(GuardConfig(spike_window=20, spike_steps=3))
    for step in range(1, 21):
        guard.check(result(loss=0.01), step=step)
    guard.check(result(loss=0.06), step=21)
    assert guard.healthy
    guard.check(result(loss=0.3), step=22)
    assert not guard.healthy


def test_the_guard_names_what_keeps_the_last_state_from_being_kept() -> None:
    guard = Guard(GuardConfig(spike_window=4, spike_steps=3))
    for step in range(1, 5):
        guard.check(result(loss=2.0), step=step)
    assert guard.unsettled(4) is None
    guard.check(result(loss=9.0), step=5)
    assert (guard.unsettled(5).first, guard.unsettled(5).last) == (5, 5)
    guard.check(result(loss=2.0), step=6)
    guard.check(result(False), step=7)
    assert "steps 7 to 7, the last of the run, had no finite gradient" in str(guard.unsettled(7))


def test_metrics_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
    _forget_after(tmp_path / "metrics.jsonl", 3)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def record_of(step: int, **values: float | None) -> str:
    return json.dumps({"step": step, "loss": 1.0, "grad_norm": 1.0, "step_seconds": 2.0, **values})


def test_counts_go_on_from_the_last_record_that_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kinds = ("text_tokens", "image_tokens", "audio_tokens", "padding_tokens", "loss_tokens")
    counted = [record_of(step, **{kind: 10 * step + place for place, kind in enumerate(kinds)}) for step in (1, 2, 3)]
    path.write_text(
        "\n".join([*counted, json.dumps({"step": 3, "heldout/loss": 1.0}), record_of(4)]) + '\n{"step": 5, "lo'
    )
    kept = _forget_after(path, 3)
    assert (kept.counts, kept.uncounted_steps) == (TokenCounts.of([30, 31, 32, 33, 34]), 0)
    assert (kept.lost_steps, kept.lost_seconds) == (1, 2.0)
    kept = _forget_after(path, 2)
    assert (kept.counts, kept.uncounted_steps, kept.lost_steps) == (TokenCounts.of([20, 21, 22, 23, 24]), 0, 1)
    # A disk that was full: the last lines were never written. And a file of before kinds were counted.
    assert _forget_after(path, 5).uncounted_steps == 3
    path.write_text(record_of(1, tokens=100) + "\n")
    assert (_forget_after(path, 1).counts, _forget_after(path, 1).uncounted_steps) == (TokenCounts(), 1)
    assert _forget_after(tmp_path / "absent.jsonl", 0).uncounted_steps == 0
    assert _forget_after(tmp_path / "absent.jsonl", 7).uncounted_steps == 7


def test_a_line_that_was_cut_off_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(record_of(1) + '\n{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


def test_a_step_without_loss_says_so() -> None:
    values = {"loss": None, "grad_norm": 0.0, "lr": 1e-4, "tokens": 10, "step_seconds": 1.0, "tokens_per_second": 1.0}
    assert step_line(7, {**values, "peak_gib": 1.0}).startswith("step 7 | no loss | grad_norm 0.00 |")


def test_a_loss_is_told_of_what_has_tokens_and_of_nothing_else() -> None:
    losses = torch.zeros(3, len(Source), 2, dtype=torch.float64)
    assert by_name(losses, datasets=["a", "b", "c"]) == {}
    losses[0, Source.TEXT], losses[0, Source.PDF] = torch.tensor([6.0, 2.0]), torch.tensor([4.0, 1.0])
    losses[2, Source.TEXT] = torch.tensor([2.0, 1.0])
    assert by_name(losses, datasets=["a", "b", "c"]) == {
        "loss": 3.0,
        "loss/text": pytest.approx(8 / 3),
        "loss/pdf": 4.0,
        "loss/dataset/a": pytest.approx(10 / 3),
        "loss/dataset/c": 2.0,
    }


@pytest.mark.parametrize(("num_samples", "most"), [(0, 4), (3, 8), (8, 8), (1000, 10), (10, 9)])
def test_held_out_samples_are_spread_over_all(num_samples: int, most: int) -> None:
    samples = spread(num_samples, most=most).tolist()
    assert len(samples) == min(num_samples, most)
    assert samples == sorted(set(samples))
    if most < num_samples:
        gaps = [after - before for before, after in pairwise([*samples, num_samples])]
        assert samples[0] == 0 and max(gaps) - min(gaps) <= 1
    else:
        assert samples == list(range(num_samples))


def test_a_step_is_one_line_in_a_fixed_order() -> None:
    values = {"loss": 2.41834, "grad_norm": 0.7132, "lr": 1.5e-4, "tokens": 8_388_608, "step_seconds": 10.9}
    values |= {"tokens_per_second": 769_600.0, "peak_gib": 61.23}
    line = step_line(1200, values)
    assert (
        line == "step 1200 | loss 2.4183 | grad_norm 0.71 | lr 1.5e-04 | 8.39M tok | 10.90 s | 769.60k tok/s | 61.2 GiB"
    )


@pytest.mark.parametrize("style", ["cosine", "linear", "constant", "inverse_sqrt"])
def test_the_learning_rate_is_that_of_its_style(style: str) -> None:
    fitting = ["optimizer.min_lr=2e-5"] if style == "constant" else ["optimizer.min_lr=3e-4"]
    fitting += ["schedule.decay_steps=90"] if style in ("cosine", "linear") else []
    config = configs.load(
        "tiny",
        ["optimizer.lr=1e-3", "training.steps=100", "schedule.warmup_steps=10", f"schedule.style={style}", *fitting],
    )
    group: dict[str, float] = {}
    optimizer = SimpleNamespace(param_groups=[group])
    for step in (0, 4, 10, 11, 50, 89, 90, 100):
        build_scheduler(config, optimizer, step=step)
        left = max(0.0, (90 - step) / 80)
        expected = {
            "cosine": 3e-4 + 7e-4 * (1 - math.cos(math.pi * left)) / 2,
            "linear": 3e-4 + 7e-4 * left,
            "constant": 1e-3,
            "inverse_sqrt": max(3e-4, 1e-3 * math.sqrt(10 / max(step, 1))),
        }[style]
        assert group["lr"] == pytest.approx(1e-4 * step if step <= 10 else expected, rel=1e-12), step


def test_presets_warm_up_within_their_run() -> None:
    for preset in configs.preset_names():
        config = configs.load(preset)
        assert config.schedule.warmup_steps < config.decay_steps <= config.training.steps


def test_a_resumed_run_may_change_the_blend_from_its_step_on(tmp_path: Path) -> None:
    def config(*changes: str) -> Config:
        return small_config("a", tmp_path, "training.steps=40", f"data.changes=[{', '.join(changes)}]")

    early, late, other = (f"{{from_step: {step}, train: {{a: 1, c: {step}}}}}" for step in (5, 10, 30))
    for changes in ((early, late), (early, other)):
        assert configs.check_resume(config(early), config(*changes), step=10, source="step_00000010").keys() == {
            "data.changes"
        }
    for changes in ((), (early.replace("c: 5", "c: 6"),), (late,)):
        with pytest.raises(ConfigError, match=r"only changes from step 10 on can differ"):
            configs.check_resume(config(early), config(*changes), step=10, source="step_00000010")
