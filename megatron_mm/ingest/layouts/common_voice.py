"""Common Voice: clips/, and tables of them: those that were validated, their splits, and those that were not."""

from megatron_mm.ingest.layouts.tree import Tree

VALIDATED = "validated.tsv"
SPLITS = ("train.tsv", "dev.tsv", "test.tsv")
NOT_VALIDATED = ("invalidated.tsv", "other.tsv", "reported.tsv")
ABOUT_CLIPS = ("clip_durations.tsv", "validated_sentences.tsv", "unvalidated_sentences.tsv")


def arrange(tree: Tree) -> None:
    """Leave validated.tsv to be read as a table, and set the others aside; its splits are read where it is missing."""
    for folder in tree.folders():
        has_all = tree.has(folder / VALIDATED)
        if not (folder / "clips").is_dir() or not (has_all or any(tree.has(folder / name) for name in SPLITS)):
            continue
        why = {
            **(dict.fromkeys(SPLITS, "a split of Common Voice's validated.tsv, which is read") if has_all else {}),
            **dict.fromkeys(NOT_VALIDATED, "Common Voice's clips that were not validated"),
            **dict.fromkeys(ABOUT_CLIPS, "a table about Common Voice's clips"),
        }
        for name, what in why.items():
            if tree.has(folder / name):
                tree.set_aside(folder / name, what)
