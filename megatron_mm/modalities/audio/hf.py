"""Recordings in exports: no stock class takes text and this encoder, so they are part of the full export alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mm.modalities.audio.spec import AUDIO, SAMPLE_RATE, AudioConfig
from megatron_mm.modalities.exports import Exports


class AudioExports(Exports):
    """Waveforms and a mask, from Wav2Vec 2.0's feature extractor."""

    modality = AUDIO
    describes, tower, projector = "audio_config", "audio_tower", "audio_projector"
    inputs, takes = ("input_values", "input_values_mask"), "sound"

    def config(self, section: AudioConfig) -> dict[str, Any]:
        """Return what the config.json of a full export says of recordings beside their encoder."""
        return {"audio_chunk_samples": section.chunk_samples}

    def processor(self, section: AudioConfig) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Return the feature extractor of a full export, and the settings of the processor's own."""
        extractor = {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "sampling_rate": SAMPLE_RATE,
            "padding_value": 0.0,
            "return_attention_mask": True,
        }
        # Not the feature extractor's do_normalize: transformers 4 reads one of that name for images and for sound.
        own = {"audio_chunk_samples": section.chunk_samples, "normalize_audio": section.normalizes}
        return {"feature_extractor": extractor}, own

    def settings(self, description: dict[str, Any]) -> dict[str, Any]:
        """Return our audio.* settings that make a folder's config.json."""
        chunk = description.get("audio_chunk_samples")
        return super().settings(description) | ({"chunk_samples": chunk} if chunk else {})

    def model_inputs(self, items: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """Return input_values and input_values_mask (num_clips, longest clip)."""
        clips = [torch.cat(list(units)) for units in items]
        lengths = torch.tensor([len(clip) for clip in clips])
        return {
            "input_values": nn.utils.rnn.pad_sequence(clips, batch_first=True),
            "input_values_mask": torch.arange(int(lengths.max())) < lengths.unsqueeze(1),
        }


EXPORTS = AudioExports()
