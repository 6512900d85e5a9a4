"""From the bytes of a recording to the chunks of waveform that its encoder takes."""

from collections.abc import Sequence

import av
import numpy as np
import torch
from torch import Tensor

from megatron_mm.modalities import decoder
from megatron_mm.modalities.audio.spec import SAMPLE_RATE, AudioConfig, AudioGeometry, audio_frames, decode_flac
from megatron_mm.modalities.decoder import Shown

NORMALIZE_EPSILON = 1e-7
"""As in Hugging Face's Wav2Vec2FeatureExtractor; torchaudio's 1e-5 differs audibly on quiet clips."""
WAVE_COLUMNS, WAVE_HEIGHT = 196, 48


class Decoder(decoder.Decoder):
    """Recordings as chunks of (num_samples,) float32 at 16 kHz, the last one at its own length."""

    library, items, mime = "FFmpeg", "recordings", "audio/flac"
    section: AudioConfig

    def reference(self, data: bytes) -> Tensor | None:
        """Return the waveform of a 16-bit mono recording, (num_samples,) float32 in [-1, 1]; None if it is damaged."""
        try:
            return torch.from_numpy(decode_flac(data))
        except (av.error.FFmpegError, ValueError, IndexError):
            return None

    def cut(self, item: Tensor) -> list[Tensor]:
        """Return a waveform in chunks, normalised first where the encoder was trained so."""
        return cut_chunks(item, self.section.chunk_samples, normalize=self.section.normalizes)

    def blank(self, num_tokens: int) -> list[Tensor]:
        """Return silence."""
        return self.cut(blank_waveform(num_tokens, self.section))

    def num_tokens(self, units: Sequence[Tensor]) -> int:
        """Return the tokens that the encoder makes of `units`."""
        return sum(audio_frames(chunk.numel()) for chunk in units)

    def show(self, unit: Tensor) -> Shown:
        """Return the range of the waveform in each column of a picture."""
        pixels = np.full((WAVE_HEIGHT, WAVE_COLUMNS, 3), 240, np.uint8)
        for column, part in enumerate(np.array_split(unit.clamp(-1, 1).numpy(), WAVE_COLUMNS)):
            top, bottom = ((1 - part.max()) / 2, (1 - part.min()) / 2) if part.size else (0.5, 0.5)
            pixels[int(top * (WAVE_HEIGHT - 1)) : int(bottom * (WAVE_HEIGHT - 1)) + 1, column] = (40, 90, 160)
        return Shown(pixels, f"{unit.numel() / SAMPLE_RATE:.2f} s, {audio_frames(unit.numel())} tokens")


def dali_decoder(section: AudioConfig, *, device_id: int | None) -> decoder.Dali:
    """Return DALI's decoder of recordings, which runs on the CPU. Raises ImportError without DALI.

    DALI 2.4 decodes only: its resampler does not low-pass, and shards hold 16 kHz already.
    """
    from megatron_mm.modalities import dali

    @dali.pipeline
    def _pipeline() -> object:
        waveform, rate = dali.fn.decoders.audio(dali.encoded(), dtype=dali.types.FLOAT, downmix=True)
        return waveform, rate

    def to_tensor(output: tuple[np.ndarray, ...]) -> Tensor | None:
        return torch.from_numpy(output[0].reshape(-1)) if output[1] == SAMPLE_RATE else None

    return dali.DaliDecoder(lambda: _pipeline(device_id=None), to_tensor, on_gpu=False)


def cut_chunks(waveform: Tensor, chunk_samples: int, *, normalize: bool) -> list[Tensor]:
    """Return a recording, (num_samples,) at 16 kHz, as chunks, the last at its own length.

    With `normalize` it is brought to zero mean and unit variance first, as Wav2Vec 2.0's lv60k form expects.
    """
    if normalize:
        waveform = (waveform - waveform.mean()) / (waveform.var(correction=0) + NORMALIZE_EPSILON).sqrt()
    return [chunk for chunk in waveform.split(chunk_samples) if audio_frames(chunk.numel())]


def blank_waveform(num_tokens: int, geometry: AudioGeometry) -> Tensor:
    """Return silence that becomes `num_tokens` tokens, at least one, (num_samples,) float32."""
    assert num_tokens > 0, num_tokens
    full, rest = divmod(num_tokens, geometry.tokens_per_chunk)
    sizes = range(geometry.chunk_samples)
    shortest = next(count for count in sizes if audio_frames(count) == rest) if rest else 0
    return torch.zeros(full * geometry.chunk_samples + shortest)
