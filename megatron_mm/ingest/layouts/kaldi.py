"""Folders of Kaldi: wav.scp names recordings, `text` has the words of utterances, `segments` where they lie in them.

A recording is one document: with its words, or with those of its segments where they are said. Paths count from the
folder or from one of those above it, as recipes run in any of these.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mm.errors import DataError
from megatron_mm.ingest.fields import Fields, Part
from megatron_mm.ingest.layouts.naming import named_file, take_table
from megatron_mm.ingest.layouts.tree import Table, Tree, head

LISTS = {
    *("utt2spk", "spk2utt", "spk2gender", "utt2dur", "reco2dur", "utt2num_frames", "utt2lang", "utt2uniq"),
    *("reco2file_and_channel", "feats.scp", "cmvn.scp", "vad.scp"),
}
"""What else such a folder lists; no words."""
RECORDING = Part(audio=["recording"], cues=["segments"])
FIELDS = Fields(name="kaldi", parts=[RECORDING, Part(text=["text"])])
ABOVE = 4
"""Folders above that paths may count from: data/train of egs/NAME/s5."""


def arrange(tree: Tree) -> None:
    """Take each wav.scp that names recordings which are there, with its words, and set the other lists aside."""
    for folder in tree.folders():
        scp, text = folder / "wav.scp", folder / "text"
        if not (tree.has(scp) and tree.has(text)):
            continue
        named = [value for _, value in _pairs(head(scp).splitlines())]
        if named and all(value.endswith("|") for value in named):
            tree.refuse(scp, "its recordings are what commands write, and none is run: write them as files")
        else:
            base = next((base for base in (folder, *folder.parents[:ABOVE]) if _is_there(tree, base, named)), None)
            if base is None or not take_table(tree, scp, Table(FIELDS, base, "", read=rows_of)):
                continue
        for file in tree.files(folder):
            if file in (text, folder / "segments"):
                tree.use(file)
            elif file.name in LISTS:
                tree.set_aside(file, "a list of a Kaldi folder that holds no words")


def _is_there(tree: Tree, base: Path, named: list[str]) -> bool:
    return any(tree.has(named_file(base, RECORDING, value)) for value in named)


def _pairs(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        key, _, value = line.strip().partition(" ")
        if value.strip():
            yield key, value.strip()


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield {recording, text} or {recording, segments} of each recording that a wav.scp lists. Raises DataError."""
    try:
        recordings, words, places = (
            dict(_pairs((path.with_name(name)).read_text(encoding="utf-8").splitlines())) if name else {}
            for name in ("wav.scp", "text", "segments" if path.with_name("segments").is_file() else "")
        )
        segments: dict[str, list[dict[str, Any]]] = {}
        for utterance, place in places.items():
            recording, start, stop = place.split()[:3]
            if utterance in words:
                said = {"start": float(start), "end": float(stop), "text": words[utterance]}
                segments.setdefault(recording, []).append(said)
    except (OSError, ValueError) as error:
        raise DataError(f"its folder is no whole Kaldi folder: {error}") from error
    known = {*recordings, *(name for name, place in places.items() if place.split()[0] in recordings)}
    yield from ({"utterance without a recording": name} for name in words if name not in known)
    for name, recording in recordings.items():
        more = {"segments": segments[name]} if name in segments else {"text": words[name]} if name in words else {}
        yield {"recording": recording, **more}
