"""Weight gradients accumulated in place are those that autograd makes and data parallelism adds."""

from pathlib import Path

import pytest
import torch
from launch import run_ranks
from small import layout, small_config
from torch import Tensor

from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import mesh as meshes
from megatron_mm.engine.gradient_fusion import wgrad_gemm_accum_fp32
from megatron_mm.training.state import TrainState, build_state
from megatron_mm.training.step import run_micro_batches

FUSED = ("linear_q", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")


def gradients(state: TrainState, loader: Loader) -> tuple[dict[str, Tensor], set[str]]:
    """Return the FP32 gradients of two micro-batches, and the parameters that were accumulated in place."""
    for model in state.models:
        model.zero_grad_buffer()
    run_micro_batches(state, loader.step(0), forward_only=False)
    named = [item for chunk in state.chunks for item in chunk.named_parameters()]
    fused = {name.split(".")[-2] for name, parameter in named if getattr(parameter, "grad_added_to_main_grad", False)}
    return {name: parameter.main_grad.clone() for name, parameter in named if parameter.requires_grad}, fused


def with_and_without(config: Config) -> None:
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    state = build_state(config, mesh)
    in_place, fused = gradients(state, loader)
    held = set(FUSED) if state.chunks[-1].post_process else set(FUSED) - {"output_layer"}
    assert held <= fused <= held | {"linear_kv"}, fused
    for chunk in state.chunks:
        for module in chunk.modules():
            if hasattr(module, "gradient_accumulation_fusion"):
                module.gradient_accumulation_fusion = False
                module.weight.grad_added_to_main_grad = False
    added, fused = gradients(state, loader)
    assert not fused
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if config.training.precision == "fp32" else {"rtol": 0.0, "atol": 0.0}
    for name, gradient in in_place.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, added[name], **tolerance, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("text", "ranks"), [("", 1), ("tp=2 pp=2", 4)])
def test_in_place_is_what_autograd_makes(text: str, ranks: int, precision: str, shards: Path) -> None:
    config = small_config(shards, "unused", f"training.precision={precision}", *layout(text))
    run_ranks(ranks, with_and_without, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_added(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs, output_gradient = torch.randn(7, 5).to(dtype), torch.randn(7, 3).to(dtype)
    main_grad = torch.randn(3, 5)
    slow = main_grad.clone()
    for row in range(3):
        for column in range(5):
            product = (output_gradient[:, row].double() * inputs[:, column].double()).sum()
            slow[row, column] += product.to(dtype).float()
    wgrad_gemm_accum_fp32(inputs, output_gradient, main_grad)
    torch.testing.assert_close(main_grad, slow, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
