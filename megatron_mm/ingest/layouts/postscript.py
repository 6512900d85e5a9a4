"""PostScript: drawings and prints that are programs, told by their first bytes: none is run or read."""

from pathlib import Path

from megatron_mm.ingest.layouts.tree import Tree

SUFFIXES = (".ps", ".eps", ".epsi", ".epsf")
MARKS = (b"%!PS", b"\xc5\xd0\xd3\xc6")
"""The second begins one that carries a preview for screens."""


def arrange(tree: Tree) -> None:
    """Set them aside."""
    for path in tree.all():
        if path.suffix.lower() in SUFFIXES and _is_postscript(path):
            tree.set_aside(path, f"a program in PostScript, which is not run ({path.suffix.lower()})")


def _is_postscript(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8).startswith(MARKS)
