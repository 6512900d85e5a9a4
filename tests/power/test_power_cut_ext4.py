"""A power cut right after a commit, on an ext4 in an image: what was said to be committed is there, whole.

`make test-power` runs these; they need root, /dev/loop and mkfs.ext4, and take about a minute.
"""

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launch import start_ranks
from small import small_config

from megatron_mm.checkpoint import save as saving
from megatron_mm.checkpoint.format import OWNER, step_of, whole_ones
from megatron_mm.checkpoint.verify import find_damage
from megatron_mm.config import Config
from megatron_mm.engine import mesh as meshes
from megatron_mm.training import loop

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
"""Neither data nor journal reach the disk from then on."""
IMAGE_BYTES = 512 << 20
CUT_OFF = 9


class Image:
    """An ext4 in a file, mounted at `folder`."""

    def __init__(self, path: Path) -> None:
        self._path, self.folder = path, path.with_suffix(".mounted")
        with path.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], check=True)
        self.folder.mkdir()
        self.mount()

    def mount(self) -> None:
        """Mount it, after its journal was replayed."""
        subprocess.run(["mount", "-o", "loop", str(self._path), str(self.folder)], check=True)

    def unmount(self) -> None:
        """Take it away; of what was only in memory nothing is left once the power was cut."""
        subprocess.run(["umount", str(self.folder)], check=True)


def cut_power(folder: Path) -> None:
    """Cut the power of the disk that `folder` is on, and of this process."""
    fcntl.ioctl(os.open(folder, os.O_RDONLY), EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    os._exit(CUT_OFF)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    lacking = [name for name in ("mkfs.ext4", "mount", "losetup") if shutil.which(name) is None]
    assert os.geteuid() == 0, "a file system is mounted by root only"
    assert not lacking, f"this machine lacks {lacking}"
    made = Image(tmp_path / "disk")
    yield made
    made.unmount()


def train(config: Config, commits: int, synced: bool) -> None:
    """Train with a checkpoint after each step until so many are committed; then the power is cut."""
    commit, left = saving.commit, [commits]

    def commit_and_cut(*args: Any, **kwargs: Any) -> dict[str, str]:
        listed = commit(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            cut_power(Path(config.run_dir))
        return listed

    saving.commit = commit_and_cut
    if not synced:
        os.fsync = os.fdatasync = lambda descriptor: None
    loop.train(config, meshes.cut(config))


def steps_after_a_cut(image: Image, shards: Path, tmp_path: Path, *, commits: int, synced: bool = True) -> list[int]:
    """Return the steps whose checkpoints a power cut right after a commit has left, the damaged ones negative."""
    run_dir = image.folder / "run"
    config = small_config(shards, run_dir, "training.global_batch_size=2", "training.steps=6", "checkpoint.interval=1")
    (rank,) = start_ranks(1, tmp_path / "meet", train, config, commits, synced)
    rank.join()
    assert rank.exitcode == CUT_OFF
    image.unmount()
    image.mount()
    found = whole_ones(run_dir / "checkpoints")
    if synced:
        assert (run_dir / "checkpoints" / OWNER).read_text()
        assert (run_dir / "config.yaml").read_text()
    return [-step_of(path) if find_damage(path) else step_of(path) for path in found]


@pytest.mark.parametrize("commits", [1, 2, 5])
def test_a_step_is_whole_after_a_power_cut_right_after_its_commit(
    commits: int, image: Image, shards: Path, tmp_path: Path
) -> None:
    found = steps_after_a_cut(image, shards, tmp_path, commits=commits)
    assert found[-1] == commits
    assert min(found) > 0


def test_without_syncs_it_would_not_be(image: Image, shards: Path, tmp_path: Path) -> None:
    assert 2 not in steps_after_a_cut(image, shards, tmp_path, commits=2, synced=False)
