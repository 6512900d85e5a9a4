"""Sets that only their own libraries read: refused by name, instead of becoming lines about files."""

from pathlib import Path

from megatron_mm.ingest.layouts.json_heads import read_object
from megatron_mm.ingest.layouts.tree import Tree
from megatron_mm.shards.format import TOKEN_MAGIC

WRITE_OUT = "Write its samples out with its own library, as JSON lines, Parquet or tars, and give those to --input"


def arrange(tree: Tree) -> None:
    """Refuse the index of each such set, and set its other files aside."""
    for folder in tree.folders():
        index = folder / "index.json"
        said = read_object(index) if tree.has(index) else None
        if said is not None and "chunks" in said and "config" in said:
            _refuse(tree, index, "a LitData set")
        elif said is not None and "shards" in said and "version" in said:
            _refuse(tree, index, "a MosaicML Streaming (MDS) set")
        for pair in [file for file in tree.files(folder) if file.suffix == ".idx"]:
            if tree.has(pair.with_suffix(".bin")) and _begins_with(pair, TOKEN_MAGIC):
                _refuse_shards(tree, pair)
        if folder.name == "_versions" and (folder.parent / "data").is_dir():
            manifests = [file for file in tree.files(folder) if file.suffix == ".manifest"]
            if manifests:
                _refuse(tree, manifests[0], "a Lance set", everything_below=folder.parent)


def _begins_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


def _refuse_shards(tree: Tree, index: Path) -> None:
    prefix = str(index.with_suffix(""))
    is_ours = tree.has(Path(prefix + ".json"))
    what = "shards that are finished" if is_ours else "tokens of Megatron"
    how = (
        f"give {prefix} to data.train, or join it to others with tools/shards.py merge"
        if is_ours
        else f"`tools/shards.py adopt {prefix} --tokenizer T` makes shards of it where it lies"
    )
    tree.refuse(index, f"it belongs to {what}, which are not preprocessed again: {how}")
    for file in tree.files(index.parent):
        if file.name.startswith(index.stem + "."):
            tree.set_aside(file, f"a file of {what}")


def _refuse(tree: Tree, index: Path, what: str, *, everything_below: Path | None = None) -> None:
    tree.refuse(index, f"it belongs to {what}, which only its own library reads. {WRITE_OUT}")
    files = tree.files(index.parent) if everything_below is None else list(tree.below(everything_below))
    for file in files:
        tree.set_aside(file, f"a file of {what}, which is refused")
