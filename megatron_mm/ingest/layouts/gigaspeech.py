"""GigaSpeech and WenetSpeech: one JSON file of long recordings, each with its segments, and the recordings beside it.

{"audios": [{"path": "audio/podcast/P0000/POD0000000001.opus", "segments": [{"begin_time", "end_time", "text_tn"}]}]}. A
recording is one document with the words of its segments where they are said.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from megatron_mm.errors import DataError
from megatron_mm.ingest.fields import Fields, Part
from megatron_mm.ingest.layouts.naming import take_table
from megatron_mm.ingest.layouts.tree import Table, Tree, head

FIELDS = Fields(name="gigaspeech", parts=[Part(audio=["path"], cues=["segments"])])


def arrange(tree: Tree) -> None:
    """Take each such file, and the recordings that it names."""
    for folder in tree.folders():
        for file in tree.files(folder):
            if file.suffix == ".json" and _is_list_of_recordings(file):
                take_table(tree, file, Table(FIELDS, folder, "", read=rows_of))


def _is_list_of_recordings(path: Path) -> bool:
    start = head(path)
    return start.lstrip().startswith("{") and all(f'"{key}"' in start for key in ("audios", "segments", "begin_time"))


class _Recording(msgspec.Struct):
    path: str
    segments: msgspec.Raw
    url: str = ""


class _Recordings(msgspec.Struct):
    audios: list[_Recording]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield {path, segments, url} of each recording, its segments as they stand. Raises DataError if it is damaged.

    The file is mapped and its millions of segments are left alone: GigaSpeech's has more bytes than a worker may hold.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        found = msgspec.json.decode(memoryview(data), type=_Recordings).audios
    except msgspec.DecodeError as error:
        raise DataError(f"it is not a list of recordings: {error}") from error
    for one in found:
        yield {"path": one.path, "segments": one.segments, **({"url": one.url} if one.url else {})}
