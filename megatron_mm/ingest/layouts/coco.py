"""COCO's captions: one JSON file of images and annotations, and the images in a folder beside it."""

from pathlib import Path

import orjson

from megatron_mm.ingest.fields import Fields, Part
from megatron_mm.ingest.layouts.naming import take_table
from megatron_mm.ingest.layouts.tables import Media
from megatron_mm.ingest.layouts.tree import Table, Tree, head


def arrange(tree: Tree) -> None:
    """Take each file of captions; files about the same images that hold no captions are refused by name."""
    for folder in tree.folders():
        for file in tree.files(folder):
            if file.suffix == ".json" and _looks_like_coco(file):
                _take(tree, file)


def _looks_like_coco(path: Path) -> bool:
    start = head(path)
    return start.lstrip().startswith("{") and '"images"' in start and '"file_name"' in start


def _take(tree: Tree, path: Path) -> None:
    try:
        said = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        tree.refuse(path, f"it begins as COCO's annotations do, and is damaged: {error}")
        return
    images, annotations = (said.get(name) if isinstance(said, dict) else None for name in ("images", "annotations"))
    if not all(
        isinstance(those, list) and all(isinstance(one, dict) for one in those) for those in (images, annotations)
    ):
        return
    name = images[0].get("file_name") if images else None
    if not isinstance(name, str) or not any("caption" in one for one in annotations[:1]):
        tree.set_aside(path, "COCO's annotations that are no captions")
        return
    media = Media(tree)
    found = media.find([name], path.parent)
    folder = found[1] if found is not None else path.parent
    base = path.parent if folder.is_relative_to(path.parent) else path.parent.parent
    part = Part(image=["file_name"], folder=str(folder.relative_to(base)))
    fields = Fields(name="coco", parts=[part, Part(text=["captions"])])
    take_table(tree, path, Table(fields, base, "coco"))
