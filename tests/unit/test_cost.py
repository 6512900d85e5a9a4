"""What matrix products cost by their shape."""

import pytest

from megatron_mm.planning.cost import (
    GPUS,
    LAUNCH_SECONDS,
    Efficiency,
    Layout,
    Shape,
    linear_seconds,
    matrices,
    product_seconds,
)

RATE = Efficiency(products=0.6, attention=0.5)
SHAPE = Shape(num_layers=4, hidden=8192, heads=64, groups=8, ffn=26624, vocab=51200, seq_len=8192, gated=True)


def layout(tp: int) -> Layout:
    return Layout(tp, 1, 1, 1, 1, 1, 8, "bf16")


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_a_large_product_runs_at_the_rate_and_a_thin_one_at_that_of_memory(gpu) -> None:
    seconds = product_seconds(65536, 32768, 8192, gpu=gpu, rate=RATE)
    assert seconds == pytest.approx(2 * 65536 * 32768 * 8192 / (0.6 * gpu.bf16_flops), rel=0.01)
    seconds = product_seconds(1, 32768, 8192, gpu=gpu, rate=RATE)
    moved = 2 * (8192 + 32768 * 8192 + 32768)
    assert seconds == pytest.approx(moved / (0.8 * gpu.hbm_bytes) + LAUNCH_SECONDS, rel=1e-6)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_a_part_of_a_product_takes_more_than_its_share_of_the_time(gpu) -> None:
    whole = product_seconds(8192, 8192, 8192, gpu=gpu, rate=RATE)
    shares = [parts * product_seconds(8192, 8192 / parts, 8192, gpu=gpu, rate=RATE) / whole for parts in (1, 2, 8, 32)]
    assert shares == sorted(shares)
    assert shares[2] > 1.02


@pytest.mark.parametrize("tp", [1, 8])
def test_a_layers_matrices_are_its_weights(tp: int) -> None:
    held = sum(inputs * outputs for _, inputs, outputs in matrices(SHAPE, layout(tp)).values())
    assert held * tp == SHAPE.layer_weights  # eight groups are shared out over eight ranks
    one_group = Shape(**{**vars(SHAPE), "groups": 1})
    tokens, inputs, outputs = matrices(one_group, layout(tp))["key_value"]
    assert inputs * outputs == 2 * 128 * 8192  # whole on every rank
    assert tokens == 8192 / tp


def test_a_backward_pass_takes_two_products_of_the_forward_passs_flops() -> None:
    forward, backward = linear_seconds(8192, 8192, 26624, gpu=GPUS["h100-80"], rate=RATE)
    assert backward == pytest.approx(2 * forward, rel=0.05)
