"""How corpora lie on disk as their publishers ship them: which files belong together, and which are no documents.

A layout is a file of this folder and a line here. It is told by what is in the files and what lies beside them, never
by a name alone; it takes what is its own from a `Tree`, and the layouts after it see the rest. What none of them takes
is read file by file. `--layout NAME` leaves all others out but that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_mm.errors import ConfigError
from megatron_mm.ingest.layouts import (
    addresses,
    class_folders,
    coco,
    common_voice,
    empty,
    foreign,
    gigaspeech,
    hub_cache,
    img2dataset,
    kaldi,
    latex,
    librispeech,
    mmc4,
    pages,
    pairs,
    postscript,
    save_to_disk,
    source_tree,
    tables,
    tedlium,
    webdataset,
)
from megatron_mm.ingest.layouts.pairs import is_captioned
from megatron_mm.ingest.layouts.tree import Arranged, Entry, Found, SetAside, Tree


@dataclass(frozen=True)
class Layout:
    """One way in which a corpus is shipped."""

    name: str
    """What `--layout` and the report call it."""
    arrange: Callable[[Tree], None]
    """A function that takes what is its own from a tree."""


LAYOUTS = (
    Layout("empty", empty.arrange),
    Layout("latex", latex.arrange),
    Layout("webdataset", webdataset.arrange),
    Layout("hub-cache", hub_cache.arrange),
    Layout("save-to-disk", save_to_disk.arrange),
    Layout("foreign", foreign.arrange),
    Layout("img2dataset", img2dataset.arrange),
    Layout("mmc4", mmc4.arrange),
    Layout("librispeech", librispeech.arrange),
    Layout("common-voice", common_voice.arrange),
    Layout("coco", coco.arrange),
    Layout("gigaspeech", gigaspeech.arrange),
    Layout("kaldi", kaldi.arrange),
    Layout("tedlium", tedlium.arrange),
    Layout("table", tables.arrange),
    Layout("addresses", addresses.arrange),
    Layout("pages", pages.arrange),
    Layout("pairs", pairs.arrange),
    Layout("source-tree", source_tree.arrange),
    Layout("postscript", postscript.arrange),
    Layout("class-folders", class_folders.arrange),
)
FILES = "files"
"""The layout of what none of these takes: each file by itself."""
NAMES = (*(layout.name for layout in LAYOUTS), FILES)
"""What `--layout` may name."""


def arrange(found: Sequence[Found], *, only: str = "", of_archive: bool = False) -> Arranged:
    """Return what becomes of each of the files `found`; `only` names the one layout that is asked.

    `of_archive` says that they are the members of an archive. Raises ConfigError if there is no such layout.
    """
    if only not in ("", *NAMES):
        raise ConfigError(f"--layout {only} is none of {', '.join(NAMES)}.")
    tree = Tree(found, of_archive=of_archive)
    for layout in LAYOUTS:
        if only in ("", layout.name):
            tree.layout = layout.name
            layout.arrange(tree)
    tree.layout = FILES
    tree.take_rest()
    return tree.arranged()


__all__ = [
    "FILES",
    "LAYOUTS",
    "NAMES",
    "Arranged",
    "Entry",
    "Found",
    "Layout",
    "SetAside",
    "Tree",
    "arrange",
    "is_captioned",
]
