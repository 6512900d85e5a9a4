"""GigaSpeech and WenetSpeech: one JSON file of long recordings, each with its segments, and the recordings beside it.

{"audios": [{"path": "audio/podcast/P0000/POD0000000001.opus", "segments": [{"begin_time", "end_time", "text_tn"}]}]}. A
recording is one document with the words of its segments where they are said.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

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


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what the file says of each recording. Raises DataError if it is damaged."""
    try:
        audios = orjson.loads(path.read_bytes())["audios"]
        yield from ({name: value for name, value in audio.items() if value is not None} for audio in audios)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"it is not a list of recordings: {error}") from error
