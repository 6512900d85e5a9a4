"""The cache of the Hugging Face hub: files by their names are links in snapshots/ to blobs/, which have none."""

from pathlib import Path

from megatron_mm.ingest.layouts.tree import Tree

SNAPSHOTS, BLOBS = "snapshots", "blobs"


def is_blob(path: Path) -> bool:
    """Tell whether a file is the content of another one, which has a name in snapshots/."""
    return path.parent.name == BLOBS and (path.parent.parent / SNAPSHOTS).is_dir()


def is_name_of_blob(link: Path) -> bool:
    """Tell whether a link is a name of a blob of its own repository."""
    above = next((folder for folder in link.parents if folder.name == SNAPSHOTS), None)
    return above is not None and link.resolve().parent == (above.parent / BLOBS).resolve()


def arrange(tree: Tree) -> None:
    """Set aside the blobs of a repository whose snapshots are read, and what the cache keeps for itself."""
    folders = tree.folders()
    for folder in folders:
        if folder.name == BLOBS and any(other.is_relative_to(folder.parent / SNAPSHOTS) for other in folders):
            for blob in tree.files(folder):
                tree.set_aside(blob, "a blob of the hub's cache, which is read by its name in snapshots/")
        elif folder.name == "refs" and (folder.parent / BLOBS).is_dir():
            for reference in tree.files(folder):
                tree.set_aside(reference, "the name of a revision in the hub's cache")
