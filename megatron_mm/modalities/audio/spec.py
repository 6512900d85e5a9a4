"""What a recording is to shards and settings: 16 kHz mono FLAC, in chunks that are encoded on their own."""

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from megatron_mm.modalities.modality import EncoderSection, Geometry, Modality
from megatron_mm.settings import PositiveInt, divisors

SAMPLE_RATE = 16_000
"""Samples per second that Wav2Vec 2.0 was trained at, and that shards hold."""
CONV_KERNELS = (10, 3, 3, 3, 3, 2, 2)
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)
"""Wav2Vec 2.0's feature encoder (Baevski et al. 2020, section 4.2): 400 samples see one frame, 320 apart."""


class AudioGeometry(Geometry):
    """How a recording becomes tokens: chunk by chunk, one token a frame."""

    chunk_samples: PositiveInt = SAMPLE_RATE
    """Samples that are encoded together, at 16 kHz: one second."""

    @property
    def tokens_per_chunk(self) -> int:
        """Decoder tokens of a whole chunk: 49 for a second."""
        return audio_frames(self.chunk_samples)

    @property
    def normalizes(self) -> bool:
        """Whether each clip is brought to zero mean and unit variance before it is cut."""
        return False

    def chunk_frames(self, num_samples: int) -> list[int]:
        """Return the frames of each chunk of a clip; the last, shorter chunk keeps its own length."""
        full, rest = divmod(num_samples, self.chunk_samples)
        frames = [self.tokens_per_chunk] * full + [audio_frames(rest)]
        return [count for count in frames if count > 0]


class AudioConfig(AudioGeometry, EncoderSection):
    """The audio encoder, over one-second chunks of 16 kHz sound (49 tokens each), and its projector."""

    encoder: str = "wav2vec2"
    """Family of the encoder, a file of modalities/audio/towers: wav2vec2, hubert."""
    num_layers: PositiveInt
    """Encoder layers."""
    hidden_size: PositiveInt
    """Width of the encoder and of its features."""
    ffn_hidden_size: PositiveInt
    """Width of the encoder's feed-forward network."""
    num_attention_heads: PositiveInt
    """Attention heads of the encoder."""
    conv_channels: PositiveInt = 512
    """Channels of the seven convolutions under the transformer."""
    pos_conv_kernel: PositiveInt = 128
    """Kernel of the convolutional position embedding, in frames."""
    pos_conv_groups: PositiveInt = 16
    """Groups of the convolutional position embedding."""
    form: Literal["ls960", "lv60k"] = "ls960"
    """ls960: as pretrained on Librispeech (group norm, post-norm layers, waveform as it is); HuBERT base.
    lv60k: as pretrained on Libri-Light (layer norm, conv biases, pre-norm layers, each clip normalised); HuBERT
    large."""
    pretrained: str | None = Field(None, min_length=1)
    """File of torchaudio or Hugging Face, Wav2Vec 2.0 or HuBERT, that a new run's encoder starts from, or `random` for
    random weights, to be trained. null takes the encoder of training.start_from; without that, a run does not start."""

    @property
    def normalizes(self) -> bool:
        """Whether each clip is brought to zero mean and unit variance before it is cut."""
        return self.form == "lv60k"

    def failures(self, name: str) -> Iterator[str]:
        """Yield what is wrong with the settings, which the user knows as `name`.*, and how to mend it."""
        yield from super().failures(name)
        for key, value in (
            ("num_attention_heads", self.num_attention_heads),
            ("pos_conv_groups", self.pos_conv_groups),
        ):
            if self.hidden_size % value:
                yield (
                    f"{name}.{key}={value} does not divide {name}.hidden_size={self.hidden_size}. Use one of "
                    f"{divisors(self.hidden_size)}."
                )
        if not self.tokens_per_chunk:
            yield f"{name}.chunk_samples={self.chunk_samples} make no frame. Use 400 or more; 16000 are a second."


class AudioModality(Modality):
    """Recordings as 16-bit mono FLAC at 16 kHz."""

    name, kind = "audio", 2
    geometry, section = AudioGeometry, AudioConfig
    unit = "second"

    def num_tokens(self, item: Any, geometry: AudioGeometry) -> int:
        """Return the placeholders of a recording of `item.num_samples` samples."""
        return sum(geometry.chunk_frames(item.num_samples))

    def unit_lengths(self, num_tokens: int, geometry: AudioGeometry) -> list[int]:
        """Return the tokens of each chunk of a recording: whole ones, and what is left."""
        full, rest = divmod(num_tokens, geometry.tokens_per_chunk)
        return [geometry.tokens_per_chunk] * full + [rest] * (rest > 0)

    def unit_tokens(self, geometry: AudioGeometry) -> int:
        """Return the tokens of a whole chunk."""
        return geometry.tokens_per_chunk

    def cut(self, item: Any, *, max_seconds: int) -> list[Any]:
        """Return a recording as clips of at most `max_seconds`; what is left must make a token."""
        limit = max_seconds * SAMPLE_RATE
        if item.num_samples <= limit:
            return [item]
        samples = decode_flac(item.data)
        clips = [samples[start : start + limit] for start in range(0, len(samples), limit)]
        return [
            replace(item, data=encode_flac(clip), num_samples=len(clip)) for clip in clips if audio_frames(len(clip))
        ]


AUDIO = AudioModality()


def audio_frames(num_samples: int) -> int:
    """Return the frames (decoder tokens) of one chunk of `num_samples` samples: 49 for a second, 0 below 400."""
    frames = num_samples
    for kernel, stride in zip(CONV_KERNELS, CONV_STRIDES, strict=True):
        frames = (frames - kernel) // stride + 1 if frames >= kernel else 0
    return frames


def decode_flac(data: bytes) -> np.ndarray:
    """Return the samples of a 16-bit mono recording: (num_samples,) float32 in [-1, 1]. Raises av.error.FFmpegError."""
    import av  # FFmpeg's libraries take a quarter of a second to load, which runs over text are spared

    # Nothing else is to be opened: a playlist would name files and addresses.
    with av.open(io.BytesIO(data), options={"protocol_whitelist": ""}) as container:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return samples.astype(np.float32) / 32768.0


def encode_flac(samples: np.ndarray) -> bytes:
    """Return `samples`, (num_samples,) in [-1, 1] at 16 kHz, as 16-bit mono FLAC."""
    import av

    quantized = (samples.clip(-1.0, 1.0) * 32767.0).round().astype(np.int16)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(quantized[None, :], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return buffer.getvalue()
