"""LibriSpeech and its like: FLAC files, and in each folder a list CHAPTER.trans.txt of their ids and words."""

from pathlib import Path

from megatron_mm.ingest.fields import Fields, Part
from megatron_mm.ingest.layouts.naming import take_table
from megatron_mm.ingest.layouts.tree import Table, Tree, head

SUFFIXES = (".flac", ".wav", ".mp3", ".opus", ".ogg")


def arrange(tree: Tree) -> None:
    """Take each list whose lines begin with the names of recordings beside it."""
    for folder in tree.folders():
        for file in tree.files(folder):
            if file.name.endswith(".trans.txt") and (suffix := _suffix_of(tree, file)):
                fields = Fields(name="librispeech", parts=[Part(audio=["name"], suffix=suffix), Part(text=["text"])])
                take_table(tree, file, Table.of(file, fields, delimiter=" ", columns=("name", "text")))


def _suffix_of(tree: Tree, path: Path) -> str:
    """Return the suffix of the recordings that a list names, "" if it names none."""
    names = [line.partition(" ")[0] for line in head(path).splitlines() if line.strip()]
    return next((one for one in SUFFIXES if any(tree.has(path.parent / f"{name}{one}") for name in names)), "")
