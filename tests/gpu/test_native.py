"""The tests of tests/kernels over all forms, with the native one on a GPU in place of the host."""

from collections.abc import Callable, Iterator

import pytest
import torch
from agreement import Case, assert_near
from test_cross_entropy import test_cross_entropy  # noqa: F401
from test_embedding import test_assemble_embeddings, test_token_rows  # noqa: F401
from test_rms_norm import test_rms_norm  # noqa: F401
from test_rope import test_mqa_rope  # noqa: F401
from test_swiglu import test_swiglu  # noqa: F401
from torch import Tensor

from megatron_mm.kernels.forms import running


@pytest.fixture
def check() -> Iterator[Callable]:
    """Compare what the GPU computes, twice and to the bit, with what is expected."""
    assert torch.cuda.is_available(), "these tests need a GPU"

    def run(case: Case, expected: list[Tensor], dtypes: list[torch.dtype]) -> None:
        first, again = ([part.cpu() for part in case(lambda tensor: tensor.cuda())] for _ in range(2))
        assert_near(first, expected, dtypes)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again))

    with running("native"):
        yield run
