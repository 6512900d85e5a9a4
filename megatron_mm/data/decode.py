"""From the bytes of media shards to what encoders take: pixels and waveforms."""

import io

import av
import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from megatron_mm.modality import CHUNK_SAMPLES, IMAGE_SIZE, audio_frames

NORMALIZE_EPSILON = 1e-7
"""As in Hugging Face's Wav2Vec2FeatureExtractor; torchaudio's 1e-5 differs audibly on quiet clips."""


def decode_pixels(data: bytes) -> Tensor:
    """Return an image squashed to 224 x 224, (3, 224, 224) uint8: bicubic with antialiasing, on 8-bit values."""
    pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return resize(pixels, [IMAGE_SIZE, IMAGE_SIZE], InterpolationMode.BICUBIC, antialias=True)


def decode_chunks(data: bytes, *, normalize: bool) -> list[Tensor]:
    """Return a 16 kHz recording as one-second chunks, (num_samples,) float32 each, the last at its own length.

    With `normalize` the clip is brought to zero mean and unit variance first, as Wav2Vec 2.0's lv60k form expects.
    """
    with av.open(io.BytesIO(data)) as container:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    waveform = torch.from_numpy(samples.astype(np.float32) / 32768.0)
    if normalize:
        waveform = (waveform - waveform.mean()) / (waveform.var(correction=0) + NORMALIZE_EPSILON).sqrt()
    return [chunk for chunk in waveform.split(CHUNK_SAMPLES) if audio_frames(chunk.numel())]
