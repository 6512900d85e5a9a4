"""From the bytes of media shards to what encoders take: pixels and waveforms. The reference, and who else may do it."""

import io
import logging
from collections.abc import Sequence
from typing import Literal, Protocol

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from megatron_mm.errors import ConfigError
from megatron_mm.modality import CHUNK_SAMPLES, IMAGE_SIZE, audio_frames

log = logging.getLogger(__name__)

NORMALIZE_EPSILON = 1e-7
"""As in Hugging Face's Wav2Vec2FeatureExtractor; torchaudio's 1e-5 differs audibly on quiet clips."""


class Decoder(Protocol):
    """Decodes media items in batches; an item that nothing can decode gives None and costs the others nothing."""

    name: str
    """For the line that says what decodes."""

    def images(self, encoded: Sequence[bytes]) -> list[Tensor | None]:
        """Return each image squashed to 224 x 224, (3, 224, 224) uint8."""

    def recordings(self, encoded: Sequence[bytes]) -> list[Tensor | None]:
        """Return the waveform of each 16 kHz recording, (num_samples,) float32 in [-1, 1]."""


class ReferenceDecoder:
    """torchvision for images, or Pillow for those that it refuses, and FFmpeg for sound."""

    name = "torchvision and FFmpeg"

    def images(self, encoded: Sequence[bytes]) -> list[Tensor | None]:
        """Return each image squashed to 224 x 224, (3, 224, 224) uint8."""
        return [_pixels_or_none(data) for data in encoded]

    def recordings(self, encoded: Sequence[bytes]) -> list[Tensor | None]:
        """Return the waveform of each 16 kHz recording, (num_samples,) float32 in [-1, 1]."""
        return [_waveform_or_none(data) for data in encoded]


def make_decoder(kind: Literal["auto", "reference", "dali"], *, has_gpu: bool) -> Decoder:
    """Return the decoder of data.decoder; auto takes DALI where there is a GPU, and the faster reference on a CPU.

    Raises ConfigError if DALI is asked for and not installed.
    """
    if kind == "reference" or (kind == "auto" and not has_gpu):
        return ReferenceDecoder()
    try:
        from megatron_mm.data.decode_dali import DaliDecoder
    except ImportError as error:
        if kind == "auto":
            log.warning("DALI is not installed (%s): media are decoded on the CPU", error)
            return ReferenceDecoder()
        raise ConfigError(
            f"data.decoder=dali needs DALI, which cannot be imported ({error}). Install nvidia-dali-cuda130, or use "
            "data.decoder=reference."
        ) from error
    return DaliDecoder(device_id=torch.cuda.current_device() if has_gpu else None)


def decode_pixels(data: bytes) -> Tensor:
    """Return an image squashed to 224 x 224, (3, 224, 224) uint8: bicubic with antialiasing, on 8-bit values.

    Within 1 of 255 of Pillow, so of timm. In white noise that is enlarged or shrunk by less than a tenth, a value in
    100,000 is off by 2: torch rounds the filter's weights to 16 bits, Pillow to 22, in each of the two passes. Pillow's
    own resize would be exact there, at twice the time.
    """
    pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    _, height, width = pixels.shape
    # Each pass rounds to 8 bits, so their order shows. Pillow 13 takes the rows first, as torchvision does, unless far
    # more lines than columns go (a rule found by trial over sizes): then the lines go here first as well.
    if height - IMAGE_SIZE > 2 * max(0, width - IMAGE_SIZE):
        pixels = resize(pixels, [IMAGE_SIZE, width], InterpolationMode.BICUBIC, antialias=True)
    return resize(pixels, [IMAGE_SIZE, IMAGE_SIZE], InterpolationMode.BICUBIC, antialias=True)


def _pixels_or_none(data: bytes) -> Tensor | None:
    try:
        return decode_pixels(data)
    except (RuntimeError, ValueError):
        return _pillow_pixels(data)


def _pillow_pixels(data: bytes) -> Tensor | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            squashed = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return torch.from_numpy(np.array(squashed)).permute(2, 0, 1).contiguous()


def decode_waveform(data: bytes) -> Tensor:
    """Return the samples of a 16-bit mono recording, (num_samples,) float32 in [-1, 1]."""
    with av.open(io.BytesIO(data)) as container:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return torch.from_numpy(samples.astype(np.float32) / 32768.0)


def _waveform_or_none(data: bytes) -> Tensor | None:
    try:
        return decode_waveform(data)
    except (av.error.FFmpegError, ValueError, IndexError):
        return None


def cut_chunks(waveform: Tensor, *, normalize: bool) -> list[Tensor]:
    """Return a recording, (num_samples,) at 16 kHz, as one-second chunks, the last at its own length.

    With `normalize` it is brought to zero mean and unit variance first, as Wav2Vec 2.0's lv60k form expects.
    """
    if normalize:
        waveform = (waveform - waveform.mean()) / (waveform.var(correction=0) + NORMALIZE_EPSILON).sqrt()
    return [chunk for chunk in waveform.split(CHUNK_SAMPLES) if audio_frames(chunk.numel())]


def decode_chunks(data: bytes, *, normalize: bool) -> list[Tensor]:
    """Return a recording as one-second chunks: `decode_waveform`, then `cut_chunks`."""
    return cut_chunks(decode_waveform(data), normalize=normalize)


def blank_pixels() -> Tensor:
    """Return what stands for an image that cannot be decoded: middle grey, (3, 224, 224) uint8."""
    return torch.full((3, IMAGE_SIZE, IMAGE_SIZE), 128, dtype=torch.uint8)


def blank_waveform(num_tokens: int) -> Tensor:
    """Return silence that becomes `num_tokens` tokens, at least one, (num_samples,) float32."""
    assert num_tokens > 0, num_tokens
    full, rest = divmod(num_tokens, audio_frames(CHUNK_SAMPLES))
    shortest = next(count for count in range(CHUNK_SAMPLES) if audio_frames(count) == rest) if rest else 0
    return torch.zeros(full * CHUNK_SAMPLES + shortest)
