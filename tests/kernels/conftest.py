"""The forms of the kernels, CUDA's on the host among them, for every test of this folder."""

from collections.abc import Callable, Iterator

import pytest
import simt
import torch
from agreement import IN_TORCH, Case, assert_near
from torch import Tensor

from megatron_mm.kernels import native
from megatron_mm.kernels.forms import running

SEEDS = (0, 1, 2)
UNALIGNED = 8
"""Bytes: keeps 8-byte ids aligned and 16-byte accesses not."""


@pytest.fixture(scope="session")
def host() -> Iterator[simt.Host]:
    """The project's kernels; `native` launches them here once a test asks for `on_host`."""
    program = simt.Host(simt.build("kernels"))
    yield program
    program.close()


@pytest.fixture
def on_host(host: simt.Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[simt.Host]:
    """Have the native form run, launching its kernels on the host, under the sanitizers."""
    host.seed = host.offset = 0
    monkeypatch.setattr(native, "BLOCKS", 3)  # so that a few rows make a block take more than one
    monkeypatch.setattr(native, "launch", lambda name, *arguments: host.launch(name, *arguments, None))
    with running("native"):
        yield host


@pytest.fixture(params=["native", "fused", "reference"])
def check(request: pytest.FixtureRequest) -> Callable[[Case, list[Tensor], list[torch.dtype]], None]:
    """Return a function that runs a case in one form and compares what it returns with what is expected.

    The CUDA source runs with unaligned tensors, and with aligned ones three times: threads and blocks in order, in the
    opposite one, and in a random one. The bits must be the same each time.
    """
    if request.param == "native":
        host: simt.Host = request.getfixturevalue("on_host")
        return lambda *arguments: _check_on_host(host, *arguments)

    def run(case: Case, expected: list[Tensor], dtypes: list[torch.dtype]) -> None:
        with running(request.param):
            found = case(lambda tensor: tensor)
        assert_near(found, expected, dtypes, IN_TORCH[request.param])

    return run


def _check_on_host(host: simt.Host, case: Case, expected: list[Tensor], dtypes: list[torch.dtype]) -> None:
    def found() -> list[Tensor]:
        return case(lambda tensor: tensor)

    host.offset, host.seed = UNALIGNED, SEEDS[-1]
    assert_near(found(), expected, dtypes)
    host.offset, host.seed = 0, SEEDS[0]
    first = found()
    assert_near(first, expected, dtypes)
    for host.seed in SEEDS[1:]:
        for ours, again in zip(first, found()):
            assert torch.equal(ours, again), "the order of threads shows"
