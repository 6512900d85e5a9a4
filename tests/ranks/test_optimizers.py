"""An optimizer is one file: another one trains, saves, resumes in other layouts, is rehearsed and planned."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_alone, run_ranks
from small import SMALL, layout, pretrained
from test_checkpoint import go_on
from test_layouts import TOLERANCE, assert_same_gradients

from megatron_mm import config as configs
from megatron_mm import optimizers
from megatron_mm.checkpoint.pickles import read_index
from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import mesh as meshes
from megatron_mm.errors import ConfigError
from megatron_mm.planning.cost import GPUS
from megatron_mm.planning.layouts import plan
from megatron_mm.planning.rehearsal import RankReport, rehearse
from megatron_mm.training import checkpoints as checkpoint
from megatron_mm.training.optimizer import clip_gradients, leave_out
from megatron_mm.training.state import build_state
from megatron_mm.training.step import run_micro_batches

EXAMPLES = str(Path(__file__).parents[1] / "examples" / "optimizers")
if multiprocessing.current_process().name != "MainProcess":  # a rank, which imports this file as it is sent a setting
    optimizers.__path__.append(EXAMPLES)


@pytest.fixture(autouse=True, scope="module")
def examples() -> Iterator[None]:
    """Find the files as if they were in the package's folder, in this file's tests alone."""
    optimizers.__path__.append(EXAMPLES)
    yield
    optimizers.__path__.remove(EXAMPLES)


OPTIMIZERS = {
    "momentum": ("optimizer.lr=0.05", "optimizer.momentum=0.8"),
    "split": ("optimizer.lr=0.01", "optimizer.epsilon=1e-6", "optimizer.clip_grad=0.5"),
}
"""Each example, with settings of its own."""
LAYOUTS = {
    "momentum": ("tp=2", "tp=1"),
    "split": ("tp=2", "pp=2", "overlap_grad_reduce=true overlap_param_gather=true"),
}
"""What two ranks go on in, each from a checkpoint of tp=2."""


def config_of(name: str, shards: str | Path, run_dir: str | Path, *overrides: str) -> Config:
    """Return the small model's configuration with another optimizer."""
    own = [text for text in SMALL if not text.startswith("optimizer.")]
    data = [f"data.train=[{shards}]", "data.validation=[]", f"run_dir={run_dir}", "training.global_batch_size=4"]
    chosen = [f"optimizer.name={name}", *OPTIMIZERS.get(name, ()), *overrides]
    return configs.load("tiny", [*own, *data, *pretrained("ls960"), *chosen])


def train(config: Config, *, stop: int, save: bool = False) -> dict[str, Any]:
    """Train to step `stop`, from the newest checkpoint if there is one."""
    return go_on(config, stop=stop, save=save)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_alike_in_every_layout_and_goes_on_in_another(name: str, shards: Path, tmp_path: Path) -> None:
    whole = run_ranks(2, train, config_of(name, shards, tmp_path / "whole", *layout("tp=2")), stop=6)
    assert whole[0]["losses"][5]["loss"] < whole[0]["losses"][0]["loss"]
    run_ranks(2, train, config_of(name, shards, tmp_path, *layout("tp=2")), stop=3, save=True)
    for text in LAYOUTS[name]:
        tolerance = 0.0 if text == "tp=2" else TOLERANCE
        seen = run_ranks(2, train, config_of(name, shards, tmp_path, *layout(text)), stop=6)
        for rank, rest in enumerate(seen):
            assert rest["first"] == 3
            for step in range(3):
                assert rest["losses"][step] == pytest.approx(whole[0]["losses"][3 + step], rel=tolerance, abs=0.0)
            assert_same_gradients(rest["gradients"], whole[0]["gradients"], tolerance)
            if text == "tp=2":
                for key, weight in whole[rank]["weights"].items():
                    assert torch.equal(rest["weights"][key], weight), key


def test_a_checkpoint_holds_the_state_of_the_rule_that_a_parameter_follows(shards: Path, tmp_path: Path) -> None:
    config = config_of("split", shards, tmp_path)
    run_ranks(1, train, config, stop=1, save=True)
    path = checkpoint.newest(config)
    assert path is not None
    keys = set(read_index(path / ".metadata").state_dict_metadata)
    states = {key.split(".")[2] for key in keys if key.startswith("optimizer.state.")}
    assert states == {"param", "velocity", "exp_avg", "exp_avg_sq"}
    matrix, vector = "decoder.layers.self_attention.linear_proj.weight", "decoder.final_layernorm.weight"
    assert {f"optimizer.state.{name}.{matrix}" in keys for name in ("param", "velocity")} == {True}
    assert {f"optimizer.state.{name}.{matrix}" in keys for name in ("exp_avg", "exp_avg_sq")} == {False}
    assert f"optimizer.state.velocity.{vector}" not in keys
    assert {f"optimizer.state.{name}.{vector}" in keys for name in ("exp_avg", "exp_avg_sq")} == {True}


def touched(config: Config) -> None:
    """Check that clipping and leaving out reach the gradients of both optimizers of a chain."""
    mesh = meshes.cut(config)
    state = build_state(config, mesh)
    optimizer = state.optimizer
    matrices, rest = optimizer.chained_optimizers
    assert not set(matrices.model_param_group_index_map) & set(rest.model_param_group_index_map)
    run_micro_batches(state, Loader(config.data.train, config=config, mesh=mesh).step(0), forward_only=False)
    optimizer.prepare_grads()
    whole = sum(float(part.get_grad_norm()) ** 2 for part in (matrices, rest))
    assert float(optimizer.get_grad_norm()) ** 2 == pytest.approx(whole, rel=1e-5)
    before = [parameter.grad.clone() for parameter in matrices.get_parameters()]
    clip_gradients(optimizer, 0.25)
    for parameter, gradient in zip(matrices.get_parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient * 0.25)
    assert rest.optimizer.gradient_divisor == 4.0  # AdamW divides as it reads
    layer = state.chunks[0].decoder.layers[0]
    own = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    assert {parameter.dim() for parameter in own} == {1, 2}
    kept = [parameter.detach().clone() for parameter in own]
    state.scheduler.step(1)
    leave_out(optimizer, own)
    assert optimizer.step_with_ready_grads()
    for parameter, value in zip(own, kept, strict=True):
        assert torch.equal(parameter, value)
    others = [parameter for parameter in state.chunks[0].decoder.layers[1].parameters() if parameter.requires_grad]
    assert all(parameter.main_grad.abs().sum() > 0 for parameter in others)
    assert {group["step"] for group in optimizer.param_groups} == {1}


def test_clipping_and_leaving_out_reach_every_optimizer_of_a_chain(shards: Path, tmp_path: Path) -> None:
    run_ranks(1, touched, config_of("split", shards, tmp_path))


def rehearsed(config: Config) -> RankReport:
    return rehearse(config, rank=0, world_size=2, on="cpu")


def test_rehearsal_and_plans_count_its_own_state(shards: Path, tmp_path: Path) -> None:
    adamw, other = (
        run_alone(rehearsed, config_of(name, shards, tmp_path, "training.precision=bf16"))
        for name in ("adamw", "momentum")
    )
    assert other.steady["optimizer"] == pytest.approx(adamw.steady["optimizer"] * 8 / 12, rel=1e-3)
    trained = adamw.steady["optimizer"] / 12
    assert adamw.checkpoint_bytes - other.checkpoint_bytes == pytest.approx(4 * trained, rel=1e-3)
    sizes = {}
    for name in ("adamw", "momentum", "split"):
        config = configs.load("mm_1b", [f"optimizer.name={name}"])
        planned, _ = plan(config, gpus=8, gpu=GPUS["a100-80"], extra_parameters=0, extra_trained=0)
        sizes[name] = planned[0].memory[0]["optimizer"]
    assert sizes["momentum"] == sizes["split"] == pytest.approx(sizes["adamw"] * 8 / 12)


def test_settings_of_another_optimizer_are_refused_by_name() -> None:
    for chosen, owners in (("momentum", "adamw and split"), ("adamw", "momentum and split")):
        setting = "optimizer.epsilon" if chosen == "momentum" else "optimizer.momentum"
        message = rf"{setting} is a setting of optimizer\.name={owners}, not of {chosen}\. Take it out"
        with pytest.raises(ConfigError, match=message):
            configs.load("tiny", [f"optimizer.name={chosen}", f"{setting}=0.5"])
    with pytest.raises(ConfigError, match=r"optimizer\.momentun is not a setting\. Did you mean optimizer\.momentum\?"):
        configs.load("tiny", ["optimizer.name=momentum", "optimizer.momentun=0.5"])
    with pytest.raises(ConfigError, match=r"optimizer\.name=momentun is no optimizer: .* Did you mean momentum\?"):
        configs.load("tiny", ["optimizer.name=momentun"])
    with pytest.raises(ConfigError, match=r"optimizer\.momentum: Input should be less than 1 \(found 1\)"):
        configs.load("tiny", ["optimizer.name=momentum", "optimizer.momentum=1"])


def test_a_run_does_not_go_on_with_another_optimizer(tmp_path: Path) -> None:
    saved, now = (configs.load("tiny", [f"optimizer.name={name}"]) for name in ("adamw", "momentum"))
    path = tmp_path / "config.yaml"
    path.write_text(configs.to_yaml(now))
    assert configs.load_saved(path).optimizer == now.optimizer
    with pytest.raises(ConfigError, match=r"optimizer\.name: adamw -> momentum"):
        configs.check_resume(saved, now, step=3, source="step_3")


def test_the_recipe_shows_the_example_as_it_is() -> None:
    tests = Path(__file__).parents[1]
    recipe = (tests.parent / "docs" / "extending.md").read_text()
    assert f"```python\n{(tests / 'examples' / 'optimizers' / 'momentum.py').read_text()}```" in recipe


def test_no_file_of_the_package_names_the_examples() -> None:
    root = Path(optimizers.__file__).parents[1]
    for name in ("momentum", "split"):
        assert not [path for path in root.rglob("*.py") if f'"{name}"' in path.read_text()]
