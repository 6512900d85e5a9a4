"""Recordings and films with the words that are said in them, each laid behind the second in which it ends."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mm.errors import DataError
from megatron_mm.ingest.document import AudioSegment, Rejection, Segment, TextSegment
from megatron_mm.ingest.transcripts import Cue


def place_words(spans: Sequence[tuple[float, Sequence[Segment]]], cues: Sequence[Cue]) -> list[Segment]:
    """Return what is seen and heard, (second at which it ends, segments), with words behind what ends as they do.

    The words of one place are one text; those of times after the end come last.
    """
    placed: list[Segment] = []
    following = 0
    for number, (end, segments) in enumerate(spans):
        placed += segments
        first = following
        is_last = number + 1 == len(spans)
        while following < len(cues) and (is_last or cues[following].stop <= end):
            following += 1
        if words := " ".join(cue.text for cue in cues[first:following]):
            placed.append(TextSegment(words + "\n"))
    return placed


def read_film(path: Path, cues: Sequence[Cue]) -> tuple[list[Segment], list[Rejection]]:
    """Return a film second by second, its words behind the second in which they end. Raises DataError."""
    from megatron_mm.ingest.video import read_seconds

    seconds, rejections = read_seconds(path)
    return place_words([(number + 1, second) for number, second in enumerate(seconds)], cues), rejections


def read_recording(recording: AudioSegment, cues: Sequence[Cue]) -> list[Segment]:
    """Return a recording in clips of whole seconds, each with the words that end in its last second behind it."""
    from megatron_mm.ingest.audio import cut_at

    ends = sorted({max(1, math.ceil(cue.stop)) for cue in cues})
    clips = cut_at(recording, ends)
    bounds = [*ends[: len(clips) - 1], math.inf]
    return place_words([(end, [clip]) for end, clip in zip(bounds, clips, strict=True)], cues)


def cut_out(recording: Segment, start: Any, seconds: Any) -> AudioSegment:
    """Return `seconds` of a recording from the second `start` on; None: from its beginning, or to its end.

    Raises DataError if the recording does not hold them.
    """
    from megatron_mm.ingest.audio import cut_between

    start, seconds = (0.0 if start is None else start), (math.inf if seconds is None else seconds)
    for value in (start, seconds):
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise DataError(f"{value!r} is no number of seconds")
    assert isinstance(recording, AudioSegment)
    return cut_between(recording, start, start + seconds)
