"""SwiGLU in all its forms beside its definition."""

from collections.abc import Callable

import pytest
import torch
from agreement import beside, draw, dtypes
from torch import Tensor

from megatron_mm.kernels.swiglu import swiglu, swiglu_reference


@dtypes
@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (2, 2112), (0, 16), (5, 0), (33, 32), (3, 5, 8)], ids=str)
def test_swiglu(check: Callable, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(*beside(swiglu_reference, swiglu, [3 * draw(dtype, *shape)]))


def test_the_fused_form_keeps_only_its_input() -> None:
    kept: list[Tensor] = []
    tensor = torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        swiglu(tensor)
    assert [saved.data_ptr() for saved in kept] == [tensor.data_ptr()]
