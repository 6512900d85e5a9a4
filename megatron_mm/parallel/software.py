"""Whether all ranks run the same software: a node with another version computes something else, in silence."""

import hashlib
import platform
import socket
from collections import Counter, defaultdict
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mm.errors import ConfigError
from megatron_mm.parallel.mesh import Mesh

PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "numpy", "tokenizers", "transformers")


def describe_software() -> dict[str, str]:
    """Return the version of everything that computes on this rank, our own sources included."""
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "none"
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return {**versions, "megatron_mm sources": digest.hexdigest()[:12]}


def check_same_software(mesh: Mesh, own: dict[str, str] | None = None) -> None:
    """Pass if every rank has the same versions; raise ConfigError on every rank, naming the odd hosts, if not.

    Collective over all ranks. `own` stands for describe_software().
    """
    everywhere: list[tuple[str, dict[str, str]]] = [("", {})] * mesh.world_size
    dist.all_gather_object(everywhere, (socket.gethostname(), own or describe_software()))
    odd: dict[str, list[str]] = defaultdict(list)
    for name in everywhere[0][1]:
        usual, _ = Counter(versions[name] for _, versions in everywhere).most_common(1)[0]
        for rank, (host, versions) in enumerate(everywhere):
            if versions[name] != usual:
                odd[f"{name} {versions[name]}, most ranks have {usual}"].append(f"{rank} on {host}")
    if odd:
        lines = [f"{what}: rank {', '.join(ranks[:8])}{' ...' * (len(ranks) > 8)}" for what, ranks in odd.items()]
        raise ConfigError("the ranks do not run the same software:\n  " + "\n  ".join(lines) + "\nMake them alike.")
