"""What one image and one second of sound become: the sizes that ingestion, data and model must agree on.

A media item is one run of placeholder ids at its true decoder length, so these numbers are part of the shard format:
they are constants, not settings.
"""

import enum

IMAGE_SIZE = 224
"""Side of the square, in pixels, that every image is squashed to."""
PATCH_SIZE = 16
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
"""Decoder tokens of one image: 196, one a patch."""

SAMPLE_RATE = 16_000
"""Samples per second that Wav2Vec 2.0 was trained at."""
CHUNK_SAMPLES = SAMPLE_RATE
"""Sound is encoded second by second."""
CONV_KERNELS = (10, 3, 3, 3, 3, 2, 2)
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)
"""Wav2Vec 2.0's feature encoder (Baevski et al. 2020, section 4.2): 400 samples see one frame, 320 apart."""


class Media(enum.IntEnum):
    """What kind of item a run of placeholders stands for."""

    IMAGE = 1
    AUDIO = 2


class Source(enum.IntEnum):
    """What kind of file a document came from; losses are reported by it."""

    TEXT = 0
    IMAGE = 1
    AUDIO = 2
    PDF = 3
    VIDEO = 4
    OFFICE = 5
    """Office files, spreadsheets, e-books and e-mail."""


def audio_frames(num_samples: int) -> int:
    """Return the frames (decoder tokens) of one chunk of `num_samples` samples: 49 for a second, 0 below 400."""
    frames = num_samples
    for kernel, stride in zip(CONV_KERNELS, CONV_STRIDES, strict=True):
        frames = (frames - kernel) // stride + 1 if frames >= kernel else 0
    return frames


def audio_tokens(num_samples: int) -> int:
    """Return the decoder tokens of a clip of `num_samples` samples."""
    return sum(audio_chunk_frames(num_samples))


def audio_chunk_frames(num_samples: int) -> list[int]:
    """Return the frames of each one-second chunk of a clip; the last, shorter chunk keeps its own length."""
    full, rest = divmod(num_samples, CHUNK_SAMPLES)
    frames = [audio_frames(CHUNK_SAMPLES)] * full + [audio_frames(rest)]
    return [count for count in frames if count > 0]
