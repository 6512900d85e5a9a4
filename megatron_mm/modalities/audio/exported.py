"""Recordings in an exported megatron_mm model: a stock tower of transformers, and what its processor makes of them."""

import importlib
import io

import numpy as np
import torch
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

CONVOLUTIONS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
"""Kernel and stride of Wav2Vec 2.0's feature encoder."""


def audio_frames(num_samples, chunk_samples):
    """Return the frames of a clip of which each chunk is encoded on its own: 49 a second of 16,000 samples."""
    total = 0
    for start in range(0, num_samples, chunk_samples):
        frames = min(chunk_samples, num_samples - start)
        for kernel, stride in CONVOLUTIONS:
            frames = (frames - kernel) // stride + 1 if frames >= kernel else 0
        total += frames
    return total


class AudioModel:
    """The model's methods for recordings."""

    def get_audio_features(self, input_values, input_values_mask=None, **kwargs):
        """(num_clips, num_samples) and its mask to pooler_output (frames of all clips, hidden_size).

        Each second is encoded on its own, and what is left of the last one at its own length: padding would change
        its features, because the encoder's group norm runs over time.
        """
        size = self.config.audio_chunk_samples
        if input_values_mask is None:
            lengths = [input_values.shape[1]] * input_values.shape[0]
        else:
            lengths = input_values_mask.long().sum(-1).tolist()
        chunks = [chunk for clip, length in zip(input_values, lengths) for chunk in clip[:length].split(size)]
        chunks = [c for c in chunks if int(self.audio_tower._get_feat_extract_output_lengths(c.shape[0])) > 0]
        features = [None] * len(chunks)
        for length in sorted({chunk.shape[0] for chunk in chunks}):
            alike = [number for number, chunk in enumerate(chunks) if chunk.shape[0] == length]
            batch = torch.stack([chunks[number] for number in alike]).to(self.dtype)
            for number, frames in zip(alike, self.audio_tower(batch).last_hidden_state):
                features[number] = frames
        features = torch.cat(features)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.audio_projector(features))


class AudioProcessor:
    """The processor's methods for recordings."""

    def replace_audio_token(self, audio_inputs, audio_idx, **kwargs):
        """Return what stands for a recording: its start, a placeholder a frame, its end."""
        num_samples = int(np.asarray(audio_inputs["input_values_mask"][audio_idx]).sum())
        frames = audio_frames(num_samples, self.audio_chunk_samples)
        return self.tokenizer.start_audio_token + self.audio_token * frames + self.tokenizer.end_audio_token

    def process_audio(self, audio, **kwargs):
        """Return the model's inputs of recordings, and what stands for each in the text."""
        return self._process_audio(audio if isinstance(audio, (list, tuple)) else [audio])

    def _process_audio(self, audio, **kwargs):
        kwargs.pop("return_tensors", None)
        kwargs.pop("padding", None)
        kwargs.setdefault("sampling_rate", self.feature_extractor.sampling_rate)
        clips = [np.asarray(clip, dtype=np.float32) for clip in audio]
        outputs = self.feature_extractor(clips, padding=True, return_attention_mask=True, return_tensors="pt", **kwargs)
        inputs = BatchFeature(
            {"input_values": outputs["input_values"], "input_values_mask": outputs["attention_mask"].bool()}
        )
        return inputs, [self.replace_audio_token(inputs, audio_idx=number) for number in range(len(clips))]

    def open_audio(self, data):
        """Return a recording of a document as `audio` takes it."""
        with importlib.import_module("av").open(io.BytesIO(data)) as container:
            clip = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
        return clip.astype(np.float32) / 32768.0

    def count_audio(self, audio_lengths):
        """Return the tokens of recordings of so many samples, as vLLM asks for them."""
        return {"num_audio_tokens": [audio_frames(n, self.audio_chunk_samples) + 2 for n in audio_lengths]}


class MODALITY:
    """What the model and its processor ask of recordings."""

    name, argument, sizes = "audio", "audio", "audio_lengths"
    inputs = ("input_values", "input_values_mask")
    encoder, model_type = "audio_config", "wav2vec2"
    tower, projector = "audio_tower", "audio_projector"
    layers = ("Wav2Vec2EncoderLayer", "HubertEncoderLayer")
    settings = {"audio_chunk_samples": 16000, "max_audio_seconds": 30}  # noqa: RUF012
    parts = ("feature_extractor",)
    model, processor = AudioModel, AudioProcessor

    @staticmethod
    def set_up(config):
        """Say the most frames of a recording: vLLM's Transformers backend sizes its budget by it, 49 a second."""
        config.audio_config.max_source_positions = 49 * config.max_audio_seconds

    @staticmethod
    def set_up_processor(processor):
        """Have the feature extractor normalise or not: transformers 4 reads one setting for images and for sound."""
        processor.feature_extractor.do_normalize = processor.normalize_audio

    @staticmethod
    def width(config):
        """Return the width of the features."""
        return config.audio_config.hidden_size
