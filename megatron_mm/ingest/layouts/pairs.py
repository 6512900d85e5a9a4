"""Media and the files of the same name beside each that hold its text: captions, transcripts, class names."""

from pathlib import Path

from megatron_mm.ingest import kinds
from megatron_mm.ingest.layouts.tree import Tree

TEXT_SUFFIXES = frozenset({".txt", ".json", ".caption", ".cap", ".cls", ".vtt", ".srt", ".tsv"})
"""Suffixes of files that say something of media of the same name."""


def is_captioned(path: Path) -> bool:
    """Return whether the text of a file, by its name, may stand in another one of the same name beside it."""
    kind = kinds.by_suffix(path)
    return kind is not None and kind.captioned


def arrange(tree: Tree) -> None:
    """Take each image, recording and video that has a text beside it: NAME.txt, NAME.jpg.txt or NAME.WORD.txt."""
    used = {(path.parent, name) for path in tree.used() if is_captioned(path) for name in (path.stem, path.name)}
    for folder in tree.folders():
        _arrange_folder(tree, tree.files(folder))
        for file in tree.files(folder) if used else ():
            names = {file.stem, file.stem.rpartition(".")[0]}
            if file.suffix.lower() in TEXT_SUFFIXES and any((folder, name) in used for name in names):
                tree.set_aside(file, "the text of a medium that another file names and has words for")


def _arrange_folder(tree: Tree, files: list[Path]) -> None:
    media: dict[str, list[Path]] = {}
    for file in files:
        if is_captioned(file):
            media.setdefault(file.stem, []).append(file)
            media.setdefault(file.name, []).append(file)
    if not media:
        return
    texts: dict[Path, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in TEXT_SUFFIXES:
            stem = file.stem
            for own in media.get(stem) or media.get(stem.rpartition(".")[0], []):
                texts.setdefault(own, []).append(file)
    for file, beside in texts.items():
        tree.take(file, beside=beside)
