"""Imports go down the floors only, and each heavy or private thing is touched in one place."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import megatron_mm

ROOT = Path(megatron_mm.__file__).parent
FLOORS = {
    **dict.fromkeys(("errors", "endings", "environment", "noise", "settings", "source", "storage"), 0),
    **dict.fromkeys(("modalities", "optimizers"), 1),
    **dict.fromkeys(("config", "kernels", "tokenizer", "shards", "batch"), 2),
    **dict.fromkeys(("engine", "ingest"), 2),
    **dict.fromkeys(("data", "model"), 3),
    "checkpoint": 4,
    **dict.fromkeys(("training", "hf"), 5),
    **dict.fromkeys(("planning", "train"), 6),
}
APART = {"ingest", "data", "model"}
"""These meet at shards.py and batch.py, and never import one another."""


PARTS_OF_A_MODALITY = {"ingest": {"spec"}, "data": {"spec", "decode"}, "model": {"spec", "encoder"}}
"""What may be imported of modalities/X, or asked of it by `part`; "hf" and what stands above may all but decode."""
KNOWS_A_MODALITY = ("ingest/audio.py", "ingest/image.py", "ingest/video.py")
"""Readers of files of a kind: elsewhere no modality is imported by its name."""
IN_A_MODALITY = re.compile(r"megatron_mm\.modalities\.(?:image|audio)\.(\w+)")


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


def parts_of_modalities() -> Iterator[tuple[Path, str]]:
    """Yield (file, part) of each import of modalities/X/part, and each `part("...")`, outside modalities."""
    for path, module in imports():
        if found := IN_A_MODALITY.match(module):
            yield path.relative_to(ROOT), found[1]
    for path in ROOT.rglob("*.py"):
        yield from ((path.relative_to(ROOT), part) for part in re.findall(r'\.part\("(\w+)"\)', path.read_text()))


def test_each_floor_imports_its_own_part_of_a_modality() -> None:
    seen = set()
    for path, part in parts_of_modalities():
        own = path.parts[0]
        seen.add((own, part))
        if own != "modalities":
            assert part in PARTS_OF_A_MODALITY.get(own, {"spec", "encoder", "hf"}), f"{path} uses {part} of a modality"
    assert {("ingest", "spec"), ("data", "decode"), ("model", "encoder")} <= seen


def test_a_spec_imports_no_torch() -> None:
    code = "import sys, megatron_mm.modalities, megatron_mm.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modalities_are_named_in_their_folders_alone() -> None:
    named = {str(path.relative_to(ROOT)) for path, module in imports() if IN_A_MODALITY.match(module)}
    assert {name for name in named if not name.startswith("modalities/")} == set(KNOWS_A_MODALITY)


def test_packages_do_not_import_one_another() -> None:
    below = {name: set() for name in FLOORS}
    for path, module in imports():
        own, other = path.relative_to(ROOT).parts[0].removesuffix(".py"), room(module)
        if own in FLOORS and other not in (None, own):
            below[own].add(other)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        raise AssertionError(f"these import one another: {' -> '.join(error.args[1])}") from error


def test_the_mesh_alone_reads_parallel_state() -> None:
    readers = {path.relative_to(ROOT) for path, module in imports() if "parallel_state" in module}
    assert readers == {Path("engine/mesh.py")}


def test_the_device_alone_asks_for_a_gpu() -> None:
    askers = {path.relative_to(ROOT) for path in ROOT.rglob("*.py") if "cuda.is_available" in path.read_text()}
    assert askers == {Path("engine/device.py")}


def test_there_is_no_room_without_a_name() -> None:
    assert not [path for path in ROOT.rglob("*.py") if path.stem in ("utils", "common", "helpers", "misc")]
