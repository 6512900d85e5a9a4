"""What a recording of sensors is to shards and settings: readings of three channels, ten a second."""

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from megatron_mm.modalities.modality import EncoderSection, Geometry, Modality
from megatron_mm.settings import PositiveInt

CHANNELS = 3
RATE = 10
"""Readings a second."""
READING_BYTES = 4 * CHANNELS
"""A reading is stored as little-endian float32, channel after channel."""


class SensorGeometry(Geometry):
    """How readings become tokens."""

    window: PositiveInt = 2
    """Readings that make one token; what is left of a recording is dropped."""


class SensorConfig(SensorGeometry, EncoderSection):
    """The sensor encoder, two layers over each window, and its projector."""

    encoder: str = "mlp"
    """Family of the encoder."""
    hidden_size: PositiveInt = 16
    """Width of the encoder and of its features."""
    pretrained: str | None = Field("random", min_length=1)
    """File that a new run's encoder starts from, or `random`."""

    def failures(self, name: str) -> Iterator[str]:
        """Yield what is wrong with the settings, which the user knows as `name`.*, and how to mend it."""
        yield from super().failures(name)
        if RATE % self.window:
            yield f"{name}.window={self.window} does not divide a second of {RATE} readings. Use 1, 2, 5 or 10."


class SensorModality(Modality):
    """Readings end to end, encoded second by second."""

    name, kind = "sensor", 3
    geometry, section = SensorGeometry, SensorConfig
    unit = "sensor_second"

    def num_tokens(self, item: Any, geometry: SensorGeometry) -> int:
        """Return the windows of a recording."""
        return len(item.data) // READING_BYTES // geometry.window

    def unit_lengths(self, num_tokens: int, geometry: SensorGeometry) -> list[int]:
        """Return the windows of each second, the last of which may be shorter."""
        full, rest = divmod(num_tokens, self.unit_tokens(geometry))
        return [self.unit_tokens(geometry)] * full + [rest] * (rest > 0)

    def unit_tokens(self, geometry: SensorGeometry) -> int:
        """Return the windows of a second."""
        return RATE // geometry.window


SENSOR = SensorModality()
