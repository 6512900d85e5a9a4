"""Imports go down the floors only, and each heavy or private thing is touched in one place."""

import ast
from collections.abc import Iterator
from pathlib import Path

import megatron_mm

ROOT = Path(megatron_mm.__file__).parent
FLOORS = {
    **dict.fromkeys(("errors", "endings", "environment", "noise", "modality"), 0),
    **dict.fromkeys(("config", "kernels", "tokenizer", "shards", "batch"), 1),
    **dict.fromkeys(("engine", "ingest"), 2),
    **dict.fromkeys(("data", "model"), 3),
    **dict.fromkeys(("training", "hf"), 4),
    **dict.fromkeys(("planning", "train"), 5),
}
APART = {"ingest", "data", "model"}
"""These meet at shards.py and batch.py, and never import one another."""


def imports() -> Iterator[tuple[Path, str]]:
    """Yield (file, imported module) of every import in the package, those inside functions included.

    The files that exports carry run in transformers, which imports them as a package of their own.
    """
    for path in ROOT.rglob("*.py"):
        if path.parent == ROOT / "hf" / "code":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                yield path, node.module
                yield from ((path, f"{node.module}.{alias.name}") for alias in node.names)


def room(dotted: str) -> str | None:
    """Return the part of the package that a file or module belongs to."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "megatron_mm" and len(parts) > 1 and parts[1] in FLOORS else None


def test_every_file_stands_on_a_floor() -> None:
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert rooms - {"__init__"} == set(FLOORS)


def test_imports_go_down() -> None:
    for path, module in imports():
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        other = room(module)
        if own == "__init__" or other is None or other == own:
            continue
        assert FLOORS[other] <= FLOORS[own], f"{path.relative_to(ROOT)} imports {module}, which stands above it"
        assert not {own, other} <= APART, f"{path.relative_to(ROOT)} imports {module}: they meet at the borders only"


def test_the_mesh_alone_reads_parallel_state() -> None:
    readers = {path.relative_to(ROOT) for path, module in imports() if "parallel_state" in module}
    assert readers == {Path("engine/mesh.py")}


def test_the_device_alone_asks_for_a_gpu() -> None:
    askers = {path.relative_to(ROOT) for path in ROOT.rglob("*.py") if "cuda.is_available" in path.read_text()}
    assert askers == {Path("engine/device.py")}


def test_there_is_no_room_without_a_name() -> None:
    assert not [path for path in ROOT.rglob("*.py") if path.stem in ("utils", "common", "helpers", "misc")]
