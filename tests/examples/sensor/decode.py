"""From the bytes of readings to what the encoder takes."""

from collections.abc import Sequence

import numpy as np
import torch
from megatron_mm.modalities.sensor.spec import CHANNELS, RATE, READING_BYTES, SensorGeometry
from torch import Tensor

from megatron_mm.modalities import decoder
from megatron_mm.modalities.decoder import Shown


class Decoder(decoder.Decoder):
    """Seconds of (num_readings, 3) float32."""

    library, items = "numpy", "sensor recordings"
    section: SensorGeometry

    def reference(self, data: bytes) -> Tensor | None:
        """Return whole windows of readings, (num_readings, 3); None if there is a part of a reading."""
        if len(data) % READING_BYTES:
            return None
        readings = torch.from_numpy(np.frombuffer(data, "<f4").reshape(-1, CHANNELS).copy())
        return readings[: len(readings) // self.section.window * self.section.window]

    def cut(self, item: Tensor) -> list[Tensor]:
        """Return a recording second by second."""
        return list(item.split(RATE))

    def blank(self, num_tokens: int) -> list[Tensor]:
        """Return readings of zero."""
        return self.cut(torch.zeros(num_tokens * self.section.window, CHANNELS))

    def num_tokens(self, units: Sequence[Tensor]) -> int:
        """Return the windows of `units`."""
        return sum(len(unit) // self.section.window for unit in units)

    def show(self, unit: Tensor) -> Shown:
        """Return the channels as rows of grey."""
        grey = unit.t().clamp(-1, 1).mul(127).add(128).byte().numpy()
        return Shown(np.repeat(np.kron(grey, np.ones((8, 8), np.uint8))[..., None], 3, axis=2), f"{len(unit)} readings")


def dali_decoder(section: SensorGeometry, *, device_id: int | None) -> None:
    """Return no decoder: DALI has none of readings, and numpy's costs nothing."""
