"""WebDataset: members of a tar that share their name up to its first dot are one sample, and one document."""

from pathlib import Path

from megatron_mm.ingest import kinds
from megatron_mm.ingest.archive import sample_key
from megatron_mm.ingest.layouts.pairs import TEXT_SUFFIXES, is_captioned
from megatron_mm.ingest.layouts.tree import Tree

DRAWN = (".tif", ".tiff")


def arrange(tree: Tree) -> None:
    """Take each sample of an archive: its media in their order, and its texts. What else it holds is set aside."""
    if not tree.of_archive:
        return
    samples: dict[tuple[Path, str], list[Path]] = {}
    for path in tree.all():
        samples.setdefault((path.parent, sample_key(path.name)), []).append(path)
    for members in samples.values():
        if len(members) > 1:
            _take_sample(tree, members)


def _take_sample(tree: Tree, members: list[Path]) -> None:
    documents = [path for path in members if kinds.by_suffix(path) == kinds.PDF]
    media = [path for path in members if is_captioned(path)]
    texts = [path for path in members if path.suffix.lower() in TEXT_SUFFIXES]
    if documents:  # MINT-1T: a PDF, its pictures again as pages of a TIFF, and what is known of it
        for path in (*media, *texts):
            if path.suffix.lower() in (*DRAWN, ".json"):
                tree.set_aside(path, f"what a sample says of its PDF ({path.suffix.lower()})")
        return
    if not media or not (texts or len(media) > 1):
        return
    first, *others = media
    rest = [path for path in members if path not in media and path not in texts]
    tree.take(first, beside=[*others, *texts])
    for path in rest:
        tree.set_aside(path, f"a part of a sample that is neither medium nor text ({path.suffix.lower()})")
