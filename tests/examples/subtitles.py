"""Subtitles (SubRip): what is said, without numbers and times."""

import re
from pathlib import Path

from megatron_mm.errors import DataError
from megatron_mm.ingest.charset import decode_text
from megatron_mm.ingest.document import TextSegment
from megatron_mm.ingest.kinds import Parts

CUE = re.compile(r"\d+\s*\n\d{2}:\d{2}:\d{2},\d{3} --> [^\n]*\n")


def read_subtitles(path: Path) -> Parts:
    """Return the lines that are shown. Raises DataError if there is no cue."""
    text = decode_text(path.read_bytes()).replace("\r\n", "\n")
    cues = CUE.split(text)
    if len(cues) == 1:
        raise DataError("it holds no cue: a number, and a line 00:00:01,000 --> 00:00:02,000")
    return [TextSegment("\n".join(cue.strip() for cue in cues if cue.strip()) + "\n")], []
