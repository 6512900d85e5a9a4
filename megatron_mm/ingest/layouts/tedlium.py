"""TED-LIUM and other sets of NIST's forms: recordings in sph/, and in stm/ beside it their words with times."""

from pathlib import Path

from megatron_mm.ingest.layouts.pairs import is_captioned
from megatron_mm.ingest.layouts.tree import Tree


def arrange(tree: Tree) -> None:
    """Take each recording with the .stm of its name, in its folder or in one beside that."""
    recordings: dict[str, list[Path]] = {}
    transcripts = [path for path in tree.all() if path.suffix == ".stm"]
    if not transcripts:
        return
    for path in tree.all():
        if is_captioned(path):
            recordings.setdefault(path.stem, []).append(path)
    for transcript in transcripts:
        near = [path for path in recordings.get(transcript.stem, []) if path.is_relative_to(transcript.parent.parent)]
        if near:
            tree.take(near[0], beside=[transcript])
