"""The sensor encoder, whole on every rank."""

import torch
from megatron_mm.modalities.sensor.spec import CHANNELS, RATE, SENSOR, SensorConfig
from torch import Tensor, nn


class Encoder(nn.Module):
    """Readings to features, one a window."""

    def __init__(self, config: SensorConfig) -> None:
        super().__init__()
        self.trainable, self.width = config.trainable, config.hidden_size
        self.family = SENSOR.family(config)
        self.tower = self.family.build(config)
        self.tower.requires_grad_(config.trainable)

    def forward(self, seconds: tuple[Tensor, ...]) -> Tensor:
        """Return the features of `seconds` of (num_readings, 3), in order: (num_windows of all, width).

        Without seconds a trainable tower still runs once, on nothing, so that every rank's gradients exist.
        """
        weight = next(self.tower.parameters())
        if not seconds and not self.trainable:
            return weight.new_empty(0, self.width)
        readings = torch.cat(seconds) if seconds else weight.new_zeros(RATE, CHANNELS)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            features = self.family.features(self.tower, readings.unsqueeze(0).to(weight.dtype)).squeeze(0)
        return features if seconds else features[:0]

    @staticmethod
    def example_unit(config: SensorConfig, *, device: torch.device | str | None = None) -> Tensor:
        """Return a unit for rehearsals and counts of work: (10, 3) float32 without values."""
        return torch.empty(RATE, CHANNELS, device=device)
