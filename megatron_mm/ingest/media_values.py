"""The media of records: what names of files and bytes in base64 are, and who reads the bytes of each kind."""

import base64
import binascii
import functools
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_mm.errors import DataError
from megatron_mm.ingest import kinds
from megatron_mm.ingest.document import Segment

MEDIA = ("image", "audio", "video")
MAX_NAME = 255
"""Bytes of the longest name that a file may have."""
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
Read = Callable[[bytes], Sequence[Segment]]
"""A function from the bytes of a media file to what it becomes."""


def medium_of(name: str) -> str:
    """Return which medium a file is by its name, "" if it is none; an address is none."""
    return "" if "://" in name else _medium_of_suffix(os.path.splitext(name)[1].lower())


@functools.cache
def _medium_of_suffix(suffix: str) -> str:
    kind = kinds.by_suffix(Path(f"name{suffix}"))
    return kind.words if kind is not None and kind.words in MEDIA else ""


def is_base64(value: str) -> bool:
    """Tell the bytes of a file in base64 from its name: they are longer than names may be."""
    return len(value) > MAX_NAME and BASE64.fullmatch(value) is not None


def decode_base64(value: str) -> bytes:
    """Return the bytes of a data: address, or of plain base64. Raises DataError if they are damaged."""
    head, _, body = value.rpartition(",")
    if head and not head.endswith(";base64"):
        raise DataError("it is a data: address that is not base64")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise DataError(f"its base64 is damaged: {error}") from error


# Readers are imported where they are asked: they take half a second, which runs over plain text are spared.
def _read_image(data: bytes) -> Sequence[Segment]:
    from megatron_mm.ingest.image import read_image

    return [read_image(data)]


def _read_audio(data: bytes) -> Sequence[Segment]:
    from megatron_mm.ingest.audio import read_audio

    return [read_audio(data)]


def _read_video(data: bytes) -> Sequence[Segment]:
    from megatron_mm.ingest.video import read_video

    with tempfile.NamedTemporaryFile(prefix="video-") as file:
        file.write(data)
        file.flush()
        segments, left_out = read_video(Path(file.name))
    if left_out:
        raise DataError(left_out[0].reason)
    return segments


READERS: dict[str, Read] = {"image": _read_image, "audio": _read_audio, "video": _read_video}
"""Who reads media by kind."""
