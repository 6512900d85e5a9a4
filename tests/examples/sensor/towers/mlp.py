"""Two linear layers over each window."""

from typing import Any

from megatron_mm.modalities.sensor.spec import CHANNELS, SensorConfig
from torch import Tensor, nn

from megatron_mm.modalities.family import Family


class Mlp(Family):
    """The module that an export carries too."""

    sizes, like = "sensor.hidden_size, window", "linear_2.bias"
    meaning = ("window",)
    model_type = "sensor_mlp"
    keys = {"hidden_size": "hidden_size", "window": "window"}  # noqa: RUF012

    def build(self, config: SensorConfig) -> nn.Module:
        """Return the module with random weights."""
        from megatron_mm.modalities.sensor.exported import SensorMLP, SensorMLPConfig

        return SensorMLP(SensorMLPConfig(hidden_size=config.hidden_size, window=config.window, channels=CHANNELS))

    def features(self, tower: nn.Module, batch: Tensor) -> Tensor:
        """Return (num_recordings, num_windows, width) of (num_recordings, num_readings, 3)."""
        return tower(batch)

    def description(self, config: SensorConfig) -> dict[str, Any]:
        """Return what config.json says of the encoder in an export."""
        sizes = {theirs: getattr(config, ours) for ours, theirs in self.keys.items()}
        return {"model_type": self.model_type, "architectures": ["SensorMLP"], "channels": CHANNELS, **sizes}


FAMILY = Mlp()
