"""training.kernels says what runs: with reference nothing but the definitions, which train to the same losses."""

import inspect
from pathlib import Path

import pytest
import torch
from launch import run_ranks
from small import layout, small_config

from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import device, mesh
from megatron_mm.kernels import attention, cross_entropy, native, rms_norm, rope, select, swiglu
from megatron_mm.model.backend import choose
from megatron_mm.training.state import build_state
from megatron_mm.training.step import train_step


def forbid_other_forms(form: str) -> None:
    """Let every function of the forms that must not run raise."""
    native.run = native.library = _forbidden("a native kernel")
    if form != "reference":
        return
    for module in (attention, cross_entropy, rms_norm, rope, swiglu):
        own = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__]
        for kind in own:
            if issubclass(kind, torch.autograd.Function) and kind is not cross_entropy._WholeVocabulary:
                kind.forward = _forbidden(f"{module.__name__}.{kind.__name__}")
    torch.nn.functional.scaled_dot_product_attention = _only_in_encoders(
        torch.nn.functional.scaled_dot_product_attention
    )


def _forbidden(name: str):
    def fail(*arguments: object, **settings: object) -> None:
        raise AssertionError(f"{name} runs")

    return fail


def _only_in_encoders(attend):
    def check(*arguments, **settings):
        callers = [frame.filename for frame in inspect.stack()]
        assert any("transformers" in file for file in callers), "the decoder's attention is not its definition"
        return attend(*arguments, **settings)

    return check


def trained(config: Config) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of two steps, in which no other form than the chosen one may run."""
    ranks = mesh.cut(config)
    form = select.select(config.training.kernels, device.current())
    forbid_other_forms(form)
    if form == "reference":
        assert choose(config).attention == "reference"
    state = build_state(config, ranks)
    loader = Loader(config.data.train, config=config, mesh=ranks)
    results = [train_step(state, loader.step(step)) for step in range(2)]
    return [(float(r.losses[:, 0].sum() / r.losses[:, 1].sum()), r.grad_norm) for r in results]


@pytest.mark.parametrize("settings", ["", "training.loss_chunk_tokens=100 model.qk_norm=true training.z_loss=1e-3"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_run_on_the_definitions_calls_nothing_else(tp: int, settings: str, shards: Path) -> None:
    common = (*layout(f"tp={tp}"), *settings.split(), "training.global_batch_size=4")
    found, expected = (
        run_ranks(tp, trained, small_config(shards, "unused", f"training.kernels={form}", *common))[0]
        for form in ("reference", "fused")
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)  # FP32: only the order of sums differs
