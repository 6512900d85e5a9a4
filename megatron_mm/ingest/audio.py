"""Sound of any container, codec and rate to 16 kHz mono FLAC."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import av
import numpy as np
import soxr

from megatron_mm.errors import DataError
from megatron_mm.ingest.document import AudioSegment, Rejection, Segment
from megatron_mm.ingest.workers import restart_limits
from megatron_mm.modalities.audio.spec import SAMPLE_RATE, audio_frames, decode_flac, encode_flac

MISSING_FRACTION = 0.02
"""A recording that is shorter than its header says by more than this is taken to be cut off."""
LATE_SECONDS = 0.25
"""How much longer than a recording the list of its clips may say that it is: codecs pad and cut their ends."""
LONG_SECONDS, MAX_DECLARED_SECONDS = 600.0, 86_400.0
LIMIT_PER_SECOND = 0.1
"""Seconds, of CPU time too, that a second of a long recording may take beyond what any file may: it takes 0.004 of CPU
time. A file that is damaged may declare any length."""
ALONE = {"protocol_whitelist": ""}
"""Lets FFmpeg open nothing but what it is given: a playlist would have it open files and addresses that it names."""
STREAMED_RIFF_BYTES = 0xFFFFFF00
"""Writers that do not know the length yet leave about this much in a WAV header."""


def read_audio(data: bytes) -> AudioSegment:
    """Return the first audio track in `data` as 16 kHz mono.

    Raises DataError if it is damaged, cut off or too short.
    """
    _check_riff_length(data)
    samples = decode_mono(io.BytesIO(data))
    if not audio_frames(len(samples)):
        raise DataError(f"the audio has {len(samples)} samples, too few for one frame")
    return AudioSegment(encode_flac(samples), len(samples))


def read_audio_file(path: Path) -> tuple[list[Segment], list[Rejection]]:
    """Return the recording in a file. Raises DataError as `read_audio`."""
    return [read_audio(path.read_bytes())], []


def cut_at(recording: AudioSegment, seconds: Sequence[int]) -> list[AudioSegment]:
    """Return a recording in clips that end at `seconds`, which rise, and the rest; what is too short is left out."""
    samples = decode_flac(recording.data)
    clips = np.split(samples, [SAMPLE_RATE * second for second in seconds if SAMPLE_RATE * second < len(samples)])
    return [AudioSegment(encode_flac(clip), len(clip)) for clip in clips if audio_frames(len(clip))]


def cut_between(recording: AudioSegment, start: float, stop: float) -> AudioSegment:
    """Return what a recording says from one second to another. Raises DataError if it ends before."""
    samples = decode_flac(recording.data)
    end = len(samples) / SAMPLE_RATE
    if start >= end or (stop != math.inf and stop > end + LATE_SECONDS):
        raise DataError(f"it ends after {end:.2f} seconds, and {start:g} to {stop:g} are asked for")
    clip = samples[round(start * SAMPLE_RATE) : None if stop == math.inf else round(stop * SAMPLE_RATE)]
    if not audio_frames(len(clip)):
        raise DataError(f"{start:g} to {stop:g} seconds are too few for one frame")
    return AudioSegment(encode_flac(clip), len(clip))


def decode_mono(file: IO[bytes], *, complete: bool = True) -> np.ndarray:
    """Return the first audio track of a media file at 16 kHz, (num_samples,) float32 in [-1, 1].

    Raises DataError if there is none, or it is damaged; if not `complete`, what comes before the damage is returned.
    """
    resampled = Resampled()
    declared = None
    try:
        with av.open(file, options=ALONE) as container:
            if not container.streams.audio:
                raise DataError("it holds no audio")
            stream = container.streams.audio[0]
            declared = float(stream.duration * stream.time_base) if stream.duration else None
            if declared and declared > LONG_SECONDS:
                restart_limits(int(min(declared, MAX_DECLARED_SECONDS) * LIMIT_PER_SECOND))
            resampled.rate = stream.rate
            for frame in container.decode(stream):
                resampled.add(_to_mono(frame))
    except DataError:
        raise
    except (av.error.FFmpegError, ValueError) as error:
        if complete or not resampled.num_samples:
            raise DataError(f"the audio is damaged: {error}") from error
    seconds = resampled.num_samples / resampled.rate
    if complete and declared and seconds < declared * (1 - MISSING_FRACTION):
        raise DataError(f"the audio is cut off: {seconds:.2f} of {declared:.2f} seconds are there")
    return resampled.finish()


class Resampled:
    """Sound at 16 kHz, of which only that is held: an hour takes 230 MB, and 690 MB at the 48 kHz of a film."""

    def __init__(self) -> None:
        self.rate, self.num_samples = SAMPLE_RATE, 0
        self._stream: soxr.ResampleStream | None = None
        self._held: list[np.ndarray] = []
        self._num_held = 0
        self._parts: list[np.ndarray] = []

    def add(self, samples: np.ndarray) -> None:
        """Take in samples, (num_samples,) float32 at `rate`."""
        self.num_samples += len(samples)
        self._held.append(samples)
        self._num_held += len(samples)
        if self._num_held >= self.rate:
            self._resample(last=False)

    def finish(self) -> np.ndarray:
        """Return all that was taken in, (num_samples,) float32 at 16 kHz."""
        self._resample(last=True)
        return np.concatenate(self._parts)

    def _resample(self, *, last: bool) -> None:
        samples = np.concatenate(self._held) if self._held else np.zeros(0, np.float32)
        self._held, self._num_held = [], 0
        if self.rate == SAMPLE_RATE:
            self._parts.append(samples)
            return
        if self._stream is None:
            self._stream = soxr.ResampleStream(self.rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        self._parts.append(self._stream.resample_chunk(samples, last=last))


def _check_riff_length(data: bytes) -> None:
    """Raise DataError if a WAV file ends before its header says; FFmpeg takes what is there without a word."""
    if data[:4] != b"RIFF" or len(data) < 8:
        return
    declared = int.from_bytes(data[4:8], "little") + 8
    if len(data) < declared < STREAMED_RIFF_BYTES:
        raise DataError(f"the audio is cut off: {len(data)} of {declared} bytes are there")


def _to_mono(frame: av.AudioFrame) -> np.ndarray:
    """Return the mean over channels, (num_samples,) float32 in [-1, 1]."""
    values = frame.to_ndarray()
    channels = frame.layout.nb_channels
    values = values if frame.format.is_planar else values.reshape(-1, channels).T  # (channels, num_samples)
    if values.dtype == np.uint8:
        values = values.astype(np.float32) / 128.0 - 1.0
    elif values.dtype.kind == "i":
        values = values.astype(np.float32) / -float(np.iinfo(values.dtype).min)
    return values.astype(np.float32).mean(axis=0)
