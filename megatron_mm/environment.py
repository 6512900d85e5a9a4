"""Numbers that a launcher leaves in the environment."""

import os

from megatron_mm.errors import ConfigError


def read_number(name: str, default: int) -> int:
    """Return the whole number in an environment variable, `default` without it. Raises ConfigError for other text."""
    text = os.environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"{name}={text} in the environment is not a whole number. torchrun, srun and SLURM set it; unset it to do "
            "without them."
        ) from None
