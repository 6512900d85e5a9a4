"""Multimodal C4: JSON lines in zips, DOCS.jsonl.zip, whose records name images in a folder images/ beside them."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import orjson

from megatron_mm.ingest.archive import ERRORS
from megatron_mm.ingest.layouts.tree import Tree

FOLDER = "images"


def arrange(tree: Tree) -> None:
    """Leave the images to the documents that name them."""
    for folder in tree.folders():
        for path in tree.files(folder):
            if path.name.endswith(".jsonl.zip"):
                for name in _images(path):
                    for target in (folder / name, folder / FOLDER / name, folder.parent / FOLDER / name):
                        if tree.has(target):
                            tree.use(target)


def _images(path: Path) -> Iterator[str]:
    """Yield the names of the images of all documents; what is damaged is for the reader to say."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as lines:
                    for line in lines:
                        for image in orjson.loads(line).get("image_info", ()):
                            yield image["image_name"]
    except (*ERRORS, orjson.JSONDecodeError, OSError, KeyError, TypeError, AttributeError):
        return
