"""What a launcher, a site or a user leaves in the environment: numbers, and where compiled code lies."""

import contextlib
import os
import tempfile
from pathlib import Path

from megatron_mm.errors import ConfigError

INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
COMPILED = ("TRITON_CACHE_DIR", INDUCTOR, "TORCH_EXTENSIONS_DIR")
"""Folders that compiled code is loaded from. Unset, torch.compile's is a name in /tmp that anybody can take."""


def read_number(name: str, default: int, *, least: int = 0) -> int:
    """Return the whole number in an environment variable, `default` without it.

    Raises ConfigError for other text, and for a number below `least` or of more than a computer's word.
    """
    text = os.environ.get(name) or str(default)
    try:
        if not least <= int(text) < 2**31:
            raise ValueError
        return int(text)
    except ValueError:
        raise ConfigError(
            f"{name}={text} in the environment is not a whole number{f' of {least} or more' if least else ''}. "
            "torchrun, srun and SLURM set it; unset it to do without them."
        ) from None


def use_private_caches() -> None:
    """Let compiled code be loaded only from folders that no other user can write.

    Raises ConfigError for such a folder that the environment names and that another user owns or may write.
    """
    for name in COMPILED:
        folder = os.environ.get(name)
        if folder and Path(folder).exists():
            if not _is_private(Path(folder)):
                raise ConfigError(
                    f"{name}={folder} in the environment belongs to another user, or others may write it, and code is "
                    f"loaded from it. Make it yours alone (chmod go-w), give another folder, or unset {name}."
                )
            os.environ[name] = os.path.realpath(folder)  # a link could be turned elsewhere later
    if not os.environ.get(INDUCTOR):
        os.environ[INDUCTOR] = str(_private_folder(Path(tempfile.gettempdir(), f"torchinductor-{os.getuid()}")))


def _private_folder(usual: Path) -> Path:
    """Return `usual`, made if it is not there, or a new folder where it is anybody else's."""
    with contextlib.suppress(FileExistsError):  # a file or a link, which is not ours
        usual.mkdir(mode=0o700, exist_ok=True)
    is_ours = usual.is_dir() and not usual.is_symlink() and _is_private(usual)
    return usual if is_ours else Path(tempfile.mkdtemp(prefix=f"{usual.name}-"))


def _is_private(folder: Path) -> bool:
    status = folder.stat()
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022
