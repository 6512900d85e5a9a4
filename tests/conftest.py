"""Fixtures that every test may use, and the count of skipped tests."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Two processes of pytest share two cores or more: threads of one that wait for one another spin, and take the other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import launch  # noqa: F401  # before a test imports megatron-core
import no_accelerators  # noqa: F401
import pytest
import small

from megatron_mm.noise import WARNINGS

MAX_SKIPPED = 0
"""Tests that may be skipped on a machine without a GPU; raise it only together with the reason for the new one."""


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of small shards with every kind of document."""
    return small.write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def heldout(shards: Path) -> Path:
    """Other documents, with the same tokenizer."""
    return small.write_shards(shards.parent, "heldout", seed=1)


@pytest.fixture(scope="module")
def memory_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one, for tests that sync files hundreds of times."""
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path_factory.mktemp("memory"))
    yield Path(folder)
    shutil.rmtree(folder)


def pytest_configure(config: pytest.Config) -> None:
    """Keep quiet what the package keeps quiet; pytest sets warning filters of its own."""
    for message in WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:.*{re.escape(message)}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were skipped, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    terminalreporter.write_line(f"{len(skipped)} tests skipped, {MAX_SKIPPED} expected")
    for report in skipped:
        terminalreporter.write_line(f"  {report.nodeid}: {report.longrepr[2]}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail when more tests are skipped than are known to be."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and reporter is not None and len(reporter.stats.get("skipped", [])) > MAX_SKIPPED:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
