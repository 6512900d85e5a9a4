"""What is read from the environment: folders of compiled code, which is loaded as code."""

import os
from pathlib import Path

import pytest

from megatron_mm.environment import COMPILED, use_private_caches
from megatron_mm.errors import ConfigError


@pytest.fixture
def unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of /tmp, and no folder of compiled code in the environment."""
    for name in COMPILED:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def plant(folder: Path, how: str) -> None:
    """Make a folder as another user would, in whose place ours is expected."""
    if how == "a link":
        (folder.parent / "elsewhere").mkdir()
        folder.symlink_to(folder.parent / "elsewhere")
        return
    folder.mkdir()
    folder.chmod(0o777 if how == "open to all" else 0o700)
    if how == "of another user":
        if os.geteuid():
            pytest.skip("only root can give a folder to another user")
        os.chown(folder, 12345, 12345)


@pytest.mark.parametrize("how", ["open to all", "of another user", "a link"])
def test_what_is_compiled_is_not_loaded_from_a_folder_that_was_planted(how: str, unset: Path) -> None:
    usual = unset / f"torchinductor-{os.getuid()}"
    plant(usual, how)
    use_private_caches()
    used = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert used.parent == unset and used != usual and used.stat().st_mode & 0o777 == 0o700


def test_what_is_compiled_is_kept_for_the_next_run(unset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        use_private_caches()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(unset / f"torchinductor-{os.getuid()}")


@pytest.mark.parametrize("name", COMPILED)
def test_a_folder_of_compiled_code_that_others_may_write_is_refused(
    name: str, unset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(unset / "site", "open to all")
    monkeypatch.setenv(name, str(unset / "site"))
    with pytest.raises(ConfigError, match=f"{name}={unset}/site .* Make it yours alone"):
        use_private_caches()
    (unset / "site").chmod(0o755)
    use_private_caches()
