"""The parts of copies in memory: who keeps whose, whose the folder is, and what a share holds."""

import os
from pathlib import Path

import pytest
import torch

from megatron_mm import config as configs
from megatron_mm.checkpoint.nodes import memory_folder, partners
from megatron_mm.checkpoint.shares import read_share, write_share
from megatron_mm.errors import ConfigError


def test_a_share_is_kept_half_of_the_data_parallel_ranks_away() -> None:
    hosts = [f"node{rank // 8}" for rank in range(64)]  # TP8 DP4 PP2
    found = partners(hosts, stride=8, dp_size=4)
    assert found[:8] == list(range(16, 24))
    assert found[32:40] == list(range(48, 56))
    assert sorted(found) == list(range(64))


@pytest.mark.parametrize(
    ("hosts", "stride", "dp_size", "first"),
    [
        ("aabb", 4, 1, [2, 3, 0, 1]),  # pipeline stages: no data-parallel rank keeps it
        ("aaaabbbb", 1, 4, [4, 5, 6, 7]),  # half of the data-parallel ranks are on this host
        ("aabbcc", 2, 3, [2, 3, 4, 5]),
        ("abc", 1, 1, [1, 2, 0]),
    ],
)
def test_a_share_is_kept_on_another_host_where_there_is_one(hosts, stride, dp_size, first) -> None:
    found = partners(list(hosts), stride=stride, dp_size=dp_size)
    assert found[: len(first)] == first
    assert all(hosts[rank] != hosts[other] for rank, other in enumerate(found))
    assert sorted(found) == list(range(len(hosts)))


def test_the_folder_of_copies_is_this_users_alone(tmp_path: Path) -> None:
    folder = memory_folder(str(tmp_path), "run")
    assert memory_folder(str(tmp_path), "run") == folder != memory_folder(str(tmp_path), "other")
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    folder.parent.chmod(0o755)
    with pytest.raises(ConfigError, match="is not a folder of this user alone .* mode 755"):
        memory_folder(str(tmp_path), "run")
    folder.parent.chmod(0o700)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder of this user alone"):
        memory_folder(str(tmp_path), "run")
    with pytest.raises(ConfigError, match="checkpoint.memory_dir=.*none cannot be written: FileNotFoundError"):
        memory_folder(str(tmp_path / "none"), "run")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_the_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(memory_folder(str(tmp_path), "run"), 65534, 65534)
    with pytest.raises(ConfigError, match="user 65534"):
        memory_folder(str(tmp_path), "run")


def test_a_share_comes_back_to_the_bit(tmp_path: Path) -> None:
    tensors = {
        "weights": torch.randn(7, 3).to(torch.bfloat16),
        "nothing": torch.empty(0, 4),
        "count": torch.tensor(5),
        "transposed": torch.randn(5, 2).T,
    }
    write_share(tmp_path / "share", tensors, own={"steps_done": 3})
    read, own = read_share(tmp_path / "share")
    assert own == {"steps_done": 3}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())


def test_copies_are_newer_than_checkpoints() -> None:
    with pytest.raises(ConfigError, match="checkpoint.memory_interval=70 is not below checkpoint.interval=70"):
        configs.load("tiny", ["checkpoint.memory_interval=70"])
