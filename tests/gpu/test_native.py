"""The tests of tests/kernels/test_native_on_host.py with the kernels on a GPU in place of the host."""

from collections.abc import Callable
from typing import Any

import pytest
import test_native_on_host as on_host
import torch
from test_native_on_host import (  # noqa: F401
    test_assemble_embeddings,
    test_cross_entropy,
    test_mqa_rope,
    test_rms_norm,
    test_swiglu,
    test_token_rows,
)
from torch import Tensor

from megatron_mm.kernels import native


class OnGpu:
    """`native`, on tensors that are moved to the GPU and back."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(native, name)

        def run(*arguments: Any) -> Any:
            moved = [part.cuda() if isinstance(part, Tensor) else part for part in arguments]
            result = function(*moved)
            if result is None:  # it has written over its first argument
                arguments[0].copy_(moved[0])
                return None
            return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()

        return run


@pytest.fixture
def check() -> Callable:
    """Compare what the GPU computes, twice and to the bit, with what is expected."""
    assert torch.cuda.is_available(), "these tests need a GPU"

    def run(case: on_host.Case, expected: list[Tensor], dtypes: list[torch.dtype]) -> None:
        first, again = case(OnGpu()), case(OnGpu())
        on_host.assert_near(first, expected, dtypes)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again))

    return run
