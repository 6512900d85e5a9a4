"""Video: frames at a set rate, each second's followed by its audio."""

from pathlib import Path

import av
import numpy as np
from PIL import Image

from megatron_mm.errors import DataError
from megatron_mm.ingest.audio import ALONE, decode_mono
from megatron_mm.ingest.document import AudioSegment, ImageSegment, Rejection, Segment
from megatron_mm.ingest.frames import frames_at, moving_pictures
from megatron_mm.ingest.image import encode_pixels
from megatron_mm.ingest.workers import restart_limits
from megatron_mm.modalities.audio.spec import SAMPLE_RATE, audio_frames, encode_flac
from megatron_mm.modalities.image.spec import ImageGeometry

FRAMES_PER_SECOND = 1
MAX_SECONDS = 3600
"""The rest of a longer video is left out."""
LIMIT_PER_SECOND = 2
"""Seconds, of CPU time too, that a second of film may take beyond what a file may: 60 frames of 4K HEVC take 1.2."""
MAX_SIDE = 2 * ImageGeometry().image_size
"""Frames are kept with their shorter side at most this long; encoders see half of it."""


def has_pictures(path: Path) -> bool:
    """Tell whether a media file shows moving pictures: cover art is none. Raises DataError if it is damaged."""
    try:
        with path.open("rb") as file, av.open(file, options=ALONE) as container:
            return moving_pictures(container) is not None
    except (av.error.FFmpegError, ValueError) as error:
        raise DataError(f"the media file is damaged: {error}") from error


def read_video(
    path: Path, *, frames_per_second: int = FRAMES_PER_SECOND, max_seconds: int = MAX_SECONDS
) -> tuple[list[Segment], list[Rejection]]:
    """Return, second by second, the frames shown at its start (and at even steps in it) and then its audio.

    Raises DataError if the video is damaged before its first frame.
    """
    seconds, rejections = read_seconds(path, frames_per_second=frames_per_second, max_seconds=max_seconds)
    return [segment for second in seconds for segment in second], rejections


def read_seconds(
    path: Path, *, frames_per_second: int = FRAMES_PER_SECOND, max_seconds: int = MAX_SECONDS
) -> tuple[list[list[Segment]], list[Rejection]]:
    """Return what `read_video` does, by seconds."""
    rejections: list[Rejection] = []
    seconds: list[list[Segment]] = []
    has_audio = False
    try:
        with path.open("rb") as file, av.open(file, options=ALONE) as container:
            has_audio = bool(container.streams.audio)
            # A file that is damaged may declare anything.
            declared = max_seconds if container.duration is None else container.duration // av.time_base + 1
        restart_limits(LIMIT_PER_SECOND * max(0, min(declared, max_seconds)))
        for tick, frame in frames_at(path, frames_per_second):
            second = tick // frames_per_second
            if second >= max_seconds:
                rejections.append(Rejection(f"{path}#t={max_seconds}", "what comes after is left out"))
                break
            seconds.extend([] for _ in range(second + 1 - len(seconds)))
            seconds[second].append(_picture(frame))
    except DataError:
        raise
    except (av.error.FFmpegError, ValueError) as error:
        if not seconds:
            raise DataError(f"the video is damaged: {error}") from error
        rejections.append(Rejection(f"{path}#t={len(seconds)}", f"the video is damaged from here on: {error}"))
    if not seconds:
        raise DataError("the video has no frames")
    clips = _audio(path, rejections) if has_audio else []
    for second, clip in enumerate(clips[: len(seconds)]):
        seconds[second].append(clip)
    return seconds, rejections


def _picture(frame: av.VideoFrame) -> ImageSegment:
    image = frame.to_image()
    turn = round(frame.rotation) % 360  # counter-clockwise, as Pillow counts too
    if turn in (90, 180, 270):
        image = image.transpose(Image.Transpose[f"ROTATE_{turn}"])
    scale = MAX_SIDE / min(image.size)
    if scale < 1:
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    return encode_pixels(image)


def _audio(path: Path, rejections: list[Rejection]) -> list[AudioSegment]:
    """Return the audio of each second, at 16 kHz; a last one too short for a frame is left out."""
    try:
        with path.open("rb") as file:
            samples = decode_mono(file, complete=False)
    except DataError as error:
        rejections.append(Rejection(f"{path}#audio", str(error)))
        return []
    chunks = np.split(samples, range(SAMPLE_RATE, len(samples), SAMPLE_RATE))
    return [AudioSegment(encode_flac(chunk), len(chunk)) for chunk in chunks if audio_frames(len(chunk))]
