"""The CUDA kernels on the host, for every test of this folder."""

from collections.abc import Iterator

import pytest
import simt

from megatron_mm.kernels import native


@pytest.fixture(scope="session")
def host() -> Iterator[simt.Host]:
    """The project's kernels; `native` launches them here once a test asks for `on_host`."""
    program = simt.Host(simt.build("kernels"))
    yield program
    program.close()


@pytest.fixture
def on_host(host: simt.Host, monkeypatch: pytest.MonkeyPatch) -> simt.Host:
    """Have `native` launch its kernels on the host, under the sanitizers."""
    host.seed = host.offset = 0
    monkeypatch.setattr(native, "BLOCKS", 3)  # so that a few rows make a block take more than one
    monkeypatch.setattr(native, "launch", lambda name, *arguments: host.launch(name, *arguments, None))
    return host
