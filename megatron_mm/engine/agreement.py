"""Whether all ranks were given the same: software, settings, data. A rank with another one trains on, in silence."""

import hashlib
import json
import os
import platform
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mm.errors import ConfigError, DataError, RunStopped, of_system

PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "numpy", "tokenizers", "transformers")
NUMERICS = ("NVTE_", "TORCH_ALLOW_TF32", "NVIDIA_TF32", "CUBLAS_WORKSPACE", "NCCL_ALGO", "NCCL_PROTO")
"""Beginnings of environment variables that change what libraries compute, or must be alike on all ranks."""
NAMED = 8
"""Ranks that a message names."""


def describe_software() -> dict[str, str]:
    """Return the version of everything that computes on this rank, our own sources and its environment included."""
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "none"
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    versions |= {f"${name}": value for name, value in os.environ.items() if name.startswith(NUMERICS)}
    return {**versions, "megatron_mm sources": digest.hexdigest()[:12]}


def check_alike(own: Mapping[str, str], *, what: str) -> None:
    """Pass if every rank has the same values; raise ConfigError on every rank, naming the odd ones, if not.

    `own` are this rank's values by name; a name that a rank lacks differs too. `what` says in messages what they are.
    Collective over all ranks: 32 bytes of each, and all values only where those differ.
    """
    digest = hashlib.sha256(json.dumps(dict(own), sort_keys=True).encode()).hexdigest()
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return
    everywhere: list[tuple[str, Mapping[str, str]]] = [("", {})] * dist.get_world_size()
    dist.all_gather_object(everywhere, (socket.gethostname(), own))
    odd: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(name for _, values in everywhere for name in values):
        usual, _ = Counter(values.get(name, "none") for _, values in everywhere).most_common(1)[0]
        for rank, (host, values) in enumerate(everywhere):
            if (found := values.get(name, "none")) != usual:
                odd[f"{name} {found}, most ranks have {usual}"].append(f"{rank} on {host}")
    lines = [f"{which}: rank {', '.join(ranks[:NAMED])}{' ...' * (len(ranks) > NAMED)}" for which, ranks in odd.items()]
    raise ConfigError(f"the ranks do not have the same {what}:\n  " + "\n  ".join(lines) + "\n  Make them alike.")


def together[T](action: Callable[[], T]) -> T:
    """Return what `action` returns on this rank, if it raises on none; otherwise raise its mistake on all ranks.

    `action` must not communicate. An error of any rank, of whichever of the three kinds, is raised everywhere, with the
    ranks that it came from, so that no rank waits for one that has left. Collective over all ranks.
    """
    result, own = None, None
    try:
        result = action()
    except (ConfigError, DataError, RunStopped) as error:
        own = (type(error), str(error), socket.gethostname())
    except OSError as error:
        refused = of_system(error)
        own = (type(refused), str(refused), socket.gethostname())
    everywhere: list[tuple[type[Exception], str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    failed = [(rank, one) for rank, one in enumerate(everywhere) if one is not None]
    if failed:
        kind, message, host = failed[0][1]
        ranks = [rank for rank, one in failed if one[1] == message]
        if len(ranks) < len(everywhere):
            some = ", ".join(map(str, ranks[:NAMED])) + " ..." * (len(ranks) > NAMED)
            message = f"rank {some} on {host}: {message}"
        raise kind(message)
    return result  # type: ignore[return-value]
