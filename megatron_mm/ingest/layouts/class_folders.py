"""Images sorted into folders, as Hugging Face's imagefolder and ImageNet are: a folder's name may be their class.

Nothing but the name says so (n01440764 and 0007 are no words, and scans are sorted by year in the same way), so it is
not made text. Such images are read alone, and the report counts them under this layout.
"""

from pathlib import Path

from megatron_mm.ingest import kinds
from megatron_mm.ingest.layouts.tree import Tree


def arrange(tree: Tree) -> None:
    """Take the images of folders of nothing but images, where two or more lie side by side in a folder without."""
    by_parent: dict[Path, list[Path]] = {}
    for folder in tree.folders():
        by_parent.setdefault(folder.parent, []).append(folder)
    for parent, folders in by_parent.items():
        sorted_in = [folder for folder in folders if all(map(_is_image, tree.files(folder)))]
        if len(sorted_in) > 1 and not any(map(_is_image, tree.files(parent))):
            for path in [path for folder in sorted_in for path in tree.files(folder)]:
                tree.take(path)


def _is_image(path: Path) -> bool:
    return kinds.by_suffix(path) == kinds.IMAGE
