"""What `datasets.Dataset.save_to_disk` writes: Arrow files, listed in state.json, beside a description of the set."""

from megatron_mm.ingest.layouts.json_heads import read_object
from megatron_mm.ingest.layouts.tree import Tree

DESCRIPTIONS = ("state.json", "dataset_info.json")


def arrange(tree: Tree) -> None:
    """Take the Arrow files that state.json lists; others there are caches of earlier steps."""
    for folder in tree.folders():
        state = read_object(folder / "state.json") if tree.has(folder / "state.json") else None
        listed = state.get("_data_files") if state is not None else None
        if not isinstance(listed, list):
            continue
        names = {one.get("filename") for one in listed if isinstance(one, dict)}
        for file in tree.files(folder):
            if file.name in names:
                tree.take(file)
            elif file.suffix == ".arrow":
                tree.set_aside(file, "a cache of an earlier step of a saved dataset")
            elif file.name in DESCRIPTIONS:
                tree.set_aside(file, "the description of a saved dataset")
        above = folder.parent / "dataset_dict.json"
        if tree.has(above):
            tree.set_aside(above, "the description of a saved dataset")
