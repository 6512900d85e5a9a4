"""Transcripts with times: SubRip, WebVTT, Podcasting 2.0's JSON, Whisper's JSON and TSV, NIST's STM."""

import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from megatron_mm.errors import DataError
from megatron_mm.ingest import account
from megatron_mm.ingest.charset import decode_text

TIMES = re.compile(r"\s*((?:\d+:)?\d+:\d+[.,]\d+)\s*-->\s*((?:\d+:)?\d+:\d+[.,]\d+)")
TAG = re.compile(r"</?[A-Za-z][^<>]*>|<[\d:.]+>|\{\\[^}]*\}")
"""Marks of style, speaker and time inside a cue (WebVTT 1, section 4.2), and SubStation's in SubRip."""
NAMES = (("startTime", "start", "begin_time"), ("endTime", "end", "end_time"), ("body", "text", "text_tn"))
"""What Podcasting 2.0, Whisper and GigaSpeech call the times of words, and the words."""
MARKS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
NOISES = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")
"""GigaSpeech's tags of punctuation, and of parts where nothing is said."""
NOT_SCORED = ("ignore_time_segment_in_scoring", "inter_segment_gap")
STM = re.compile(r"\S+\s+\S+\s+\S+\s+([\d.]+)\s+([\d.]+)(?:\s+<[^>]*,[^>]*>)?(?:\s+(.*))?")
VOICE = re.compile(r"<v(?:\.[^\s>]*)?\s+([^>]+)>")


@dataclass(frozen=True)
class Cue:
    """Words, and the seconds between which they are said."""

    start: float
    stop: float
    text: str


def read_cues(path: Path) -> list[Cue] | None:
    """Return the words of a transcript in the order of their times, None if the file is none. Raises DataError."""
    suffix = path.suffix.lower()
    if suffix in (".srt", ".vtt"):
        cues = list(_blocks(decode_text(path.read_bytes())))
        if not cues:
            raise DataError("it holds no cue with its times")
    elif suffix == ".json":
        cues = _json_cues(path)
    elif suffix == ".tsv":
        cues = _tsv_cues(decode_text(path.read_bytes()))
    elif suffix == ".stm":
        cues = list(_stm_cues(decode_text(path.read_bytes())))
    else:
        return None
    return sorted(cues, key=lambda cue: cue.start) if cues is not None else None


def _blocks(text: str) -> Iterator[Cue]:
    """Yield the cues of SubRip or WebVTT: a line of times, and the lines after it up to an empty one."""
    for block in re.split(r"\n[ \t]*\n", text.replace("\r", "\n")):
        lines = block.split("\n")
        for number, line in enumerate(lines):
            if found := TIMES.match(line):
                words = " ".join(" ".join(lines[number + 1 :]).split())
                words = VOICE.sub(lambda voice: f"{voice[1].strip()}: ", words)
                words = html.unescape(TAG.sub("", words)).strip()
                if words:
                    yield Cue(_seconds(found[1]), _seconds(found[2]), words)
                break


def _seconds(clock: str) -> float:
    total = 0.0
    for part in clock.replace(",", ".").split(":"):
        total = total * 60 + float(part)
    return total


def _json_cues(path: Path) -> list[Cue] | None:
    try:
        said = json.loads(decode_text(path.read_bytes()))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"it is not JSON: {error}") from error
    segments = said.get("segments") if isinstance(said, dict) else None
    if not isinstance(segments, list) or not segments:
        return None
    cues = [_json_cue(segment) for segment in segments if isinstance(segment, dict)]
    return [cue for cue in cues if cue is not None and cue.text]


def record_cues(name: str, segments: Any) -> list[Cue]:
    """Return the words of a field of a record in the order of their times. Raises DataError if they have none."""
    if isinstance(segments, msgspec.Raw):
        segments = msgspec.json.decode(segments)
    if not isinstance(segments, list) or not all(isinstance(one, dict) for one in segments):
        raise DataError(f"{name} is not a list of words with their times")
    cues = [_json_cue(one) for one in segments]
    if not cues or any(cue is None for cue in cues):
        raise DataError(f"{name}: its words have no times, or its times no words")
    spoken = [replace(cue, text=_without_tags(cue.text)) for cue in cues if cue is not None]
    return sorted((cue for cue in spoken if cue.text), key=lambda cue: cue.start)


def _without_tags(words: str) -> str:
    """Return words with the marks that GigaSpeech's tags stand for; "" for what is noise, which is counted."""
    if words.strip() in NOISES:
        account.count(account.NOT_KEPT, f"parts of recordings without words ({words.strip()})")
        return ""
    for tag, mark in MARKS.items():
        words = words.replace(f" {tag}", mark).replace(tag, mark)
    return words.strip()


def _json_cue(segment: Mapping[str, Any]) -> Cue | None:
    start, stop, words = (next((segment[name] for name in names if name in segment), None) for names in NAMES)
    if not isinstance(words, str) or not isinstance(start, int | float):
        return None
    speaker = f"{segment['speaker']}: " if segment.get("speaker") not in (None, "", "N/A") else ""
    return Cue(float(start), float(stop) if isinstance(stop, int | float) else float(start), speaker + words.strip())


def _tsv_cues(text: str) -> list[Cue] | None:
    """Return the cues of Whisper's TSV, whose times are milliseconds."""
    head, *lines = text.splitlines()
    if head.split("\t") != ["start", "end", "text"]:
        return None
    rows = [line.split("\t", 2) for line in lines if line.strip()]
    return [Cue(int(start) / 1000, int(stop) / 1000, words.strip()) for start, stop, words in rows]


def _stm_cues(text: str) -> Iterator[Cue]:
    """Yield the cues of NIST's STM: file, channel, speaker, start, end, <labels>, words; ;; begins a comment."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith(";;"):
            continue
        found = STM.fullmatch(line.strip())
        if found is None:
            raise DataError(f"line {number} is no segment of STM")
        start, stop, words = float(found[1]), float(found[2]), (found[3] or "").strip()
        if words.lower() in NOT_SCORED:
            account.count(account.NOT_KEPT, f"parts of recordings without words ({words.lower()})")
        elif words:
            yield Cue(start, stop, words)
