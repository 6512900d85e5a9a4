"""Files of no bytes: __init__.py, marks of other tools, downloads that failed."""

from megatron_mm.ingest.layouts.tree import Tree


def arrange(tree: Tree) -> None:
    """Set them aside."""
    for path in tree.all():
        if path.stat().st_size == 0:
            tree.set_aside(path, "an empty file")
