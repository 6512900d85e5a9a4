"""The audio encoder: a tower of the family that audio.encoder names, whole on every rank."""

import torch
from torch import Tensor, nn

from megatron_mm.modalities.audio.spec import AUDIO, AudioConfig


class Encoder(nn.Module):
    """Chunks of recordings to features, 49 a second; a shorter last chunk is encoded at its own length.

    Zero padding would change the valid frames of Wav2Vec 2.0's ls960 form by up to 0.8 standard deviations: its group
    norm runs over time.
    """

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.trainable = config.trainable
        self.width, self.chunk_samples = config.hidden_size, config.chunk_samples
        self.family = AUDIO.family(config)
        self.tower = self.family.build(config)
        self.tower.requires_grad_(config.trainable)

    def forward(self, chunks: tuple[Tensor, ...]) -> Tensor:
        """Return the features of `chunks`, in order.

        Shapes: chunks of (num_samples,) float32 at 16 kHz; returns (num_frames of all, width). Without chunks a
        trainable tower still runs once, on nothing, so that every rank's gradients exist.
        """
        weight = next(self.tower.parameters())
        if not chunks and not self.trainable:
            return weight.new_empty(0, self.width)
        features: list[Tensor] = [torch.empty(0)] * len(chunks)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            if not chunks:
                return self.family.features(self.tower, weight.new_zeros(1, self.chunk_samples))[0, :0]
            for indices in _by_length(chunks):
                batch = torch.stack([chunks[index] for index in indices]).to(weight.dtype)  # (num_chunks, num_samples)
                for index, frames in zip(indices, self.family.features(self.tower, batch).unbind(0)):
                    features[index] = frames
        return torch.cat(features)

    @staticmethod
    def example_unit(config: AudioConfig, *, device: torch.device | str | None = None) -> Tensor:
        """Return a unit for rehearsals and counts of work: a chunk of (chunk_samples,) float32 without values."""
        return torch.empty(config.chunk_samples, device=device)


def _by_length(chunks: tuple[Tensor, ...]) -> list[list[int]]:
    """Group the indices of chunks that are equally long, so that each group is one batch."""
    groups: dict[int, list[int]] = {}
    for index, chunk in enumerate(chunks):
        groups.setdefault(chunk.numel(), []).append(index)
    return list(groups.values())
