"""Queries, keys and values, normed and turned, in all forms beside their definition."""

from collections.abc import Callable

import pytest
import torch
from agreement import beside, draw, dtypes
from torch import Tensor

from megatron_mm.kernels.rope import mqa_rope, mqa_rope_native, mqa_rope_reference

EPSILON = 1e-5


@dtypes
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "alone"])
@pytest.mark.parametrize("shape", [(3, 8, 1, 6), (2, 4, 2, 256), (0, 2, 1, 4), (29, 4, 1, 16), (1, 1, 1, 2)], ids=str)
def test_mqa_rope(check: Callable, dtype: torch.dtype, shape: tuple[int, int, int, int], norm: bool) -> None:
    # (29, 4, 1, 16) has more heads than the blocks of the backward pass turn at a time: weights' gradients add up.
    tokens, heads, groups, head_dim = shape
    query, wider = draw(dtype, tokens, heads, head_dim), draw(dtype, tokens, groups + 1, 2, head_dim)
    key_value = wider[:, 1:]  # a rank's groups among those of all: tokens are not packed
    weights = [draw(dtype, head_dim, seed=seed) for seed in (1, 2)] if norm else []
    positions = torch.cat([torch.arange(tokens - tokens // 3), torch.arange(tokens // 3)])  # a second document
    angles = torch.outer(positions.double(), 10000.0 ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float64))
    turn = {"cos": angles.cos().float(), "sin": angles.sin().float(), "epsilon": EPSILON}

    def over(rope: Callable) -> Callable:
        def run(query: Tensor, key_value: Tensor, *weights: Tensor, **turn: Tensor) -> tuple[Tensor, ...]:
            return rope(query, key_value=key_value, **turn, **dict(zip(("query_weight", "key_weight"), weights)))

        return run

    check(*beside(over(mqa_rope_reference), over(mqa_rope), [query, key_value, *weights], **turn))


@pytest.mark.usefixtures("on_host")
def test_a_head_too_wide_is_refused() -> None:
    heads = torch.zeros(1, 1, 258)
    with pytest.raises(ValueError, match="wider than the kernel holds"):
        mqa_rope_native(heads, torch.zeros(1, 1, 2, 258), *torch.zeros(2, 1, 129), None, None, EPSILON)
