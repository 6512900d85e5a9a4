"""The frames of a film at a set rate, with no more of it decoded than they need."""

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av

from megatron_mm.errors import DataError
from megatron_mm.ingest.audio import ALONE
from megatron_mm.ingest.image import MAX_PIXELS

SKIPS_EXACTLY = {"h264", "mpeg2video"}
"""Codecs whose decoders can pass over frames that no other frame is made from. In HEVC others may yet be made from what
they pass over, in MPEG-4 two frames may lie in one packet, and other decoders decode all that they are given."""
Shown = Iterator[tuple[int, av.VideoFrame]]
"""(tick, frame): the first frame shown at or after each tick of 1 / rate seconds from the first frame."""


def moving_pictures(container: av.container.InputContainer) -> av.VideoStream | None:
    """Return the first video stream that is no cover art."""
    cover = av.stream.Disposition.attached_pic
    return next((stream for stream in container.streams.video if not stream.disposition & cover), None)


def frames_at(path: Path, rate: int) -> Shown:
    """Yield the frames that `all_frames_at` yields, and decode what they need.

    Where a frame is not there that the container promises, and at damage, all that follows is decoded. Raises as it.
    """
    following = 0
    try:
        for tick, frame in _needed(path, rate):
            yield tick, frame
            following = tick + 1
    except (_NotAsPromised, av.error.FFmpegError, ValueError):
        for tick, frame in all_frames_at(path, rate):
            if tick >= following:
                yield tick, frame


def all_frames_at(path: Path, rate: int) -> Shown:
    """Yield (tick, frame) for the first frame shown at or after each tick of 1 / rate seconds from the first frame.

    Decodes every frame. Raises DataError if the file has no moving pictures, or too large ones, and FFmpegError or
    ValueError at damage.
    """
    with path.open("rb") as file, av.open(file, options=ALONE) as container:
        stream = _checked(container)
        first: Fraction | None = None
        following = 0
        for number, frame in enumerate(container.decode(stream)):
            unit = frame.time_base or stream.time_base
            time = Fraction(number) / (stream.average_rate or 25) if frame.pts is None else frame.pts * unit
            first = time if first is None else first
            tick = int((time - first) * rate)
            if tick >= following:
                following = tick + 1
                yield tick, frame


class _NotAsPromised(Exception):
    """The frames of a film are not those that its container lists, or cannot be told by it."""


def _checked(container: av.container.InputContainer) -> av.VideoStream:
    stream = moving_pictures(container)
    if stream is None:
        raise DataError("the file has no moving pictures")
    if stream.width * stream.height > MAX_PIXELS:
        raise DataError(f"its frames have {stream.width} x {stream.height} pixels, more than {MAX_PIXELS:,}")
    stream.codec_context.thread_count = 1  # as many files are read at once as there are cores; more threads cost 15%
    return stream


def _needed(path: Path, rate: int) -> Shown:
    """Yield frames as `all_frames_at`. Raises _NotAsPromised where that is not sure to be the same."""
    promised = deque(_promised(path, rate))
    times = {time for _, time in promised}
    with path.open("rb") as file, av.open(file, options=ALONE) as container:
        stream = _checked(container)
        context = stream.codec_context
        for packet in container.demux(stream):
            is_needed = packet.pts is None or packet.pts in times
            if context.codec.intra_only and not is_needed:
                continue
            context.skip_frame = "DEFAULT" if is_needed else "NONREF"
            for frame in packet.decode():
                if frame.pts is None or (promised and frame.pts > promised[0][1]):
                    raise _NotAsPromised
                if promised and frame.pts == promised[0][1]:
                    yield promised.popleft()[0], frame
    if promised:
        raise _NotAsPromised


def _promised(path: Path, rate: int) -> list[tuple[int, int]]:
    """Return (tick, time) of the frames that are shown at ticks, as the container lists them."""
    with path.open("rb") as file, av.open(file, options=ALONE) as container:
        stream = _checked(container)
        if not (stream.codec_context.codec.intra_only or stream.codec_context.name in SKIPS_EXACTLY):
            raise _NotAsPromised
        packets = [(packet.pts, packet.is_discard) for packet in container.demux(stream) if packet.size]
        if any(time is None for time, _ in packets):
            raise _NotAsPromised
        times = sorted(time for time, is_passed_over in packets if not is_passed_over)
        if not times:
            raise _NotAsPromised
        found: list[tuple[int, int]] = []
        for time in times:
            tick = int((time - times[0]) * stream.time_base * rate)
            if not found or tick > found[-1][0]:
                found.append((tick, time))
        return found
