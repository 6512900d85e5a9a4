"""Readings in exports: part of the full one alone."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron_mm.modalities.sensor.spec import SENSOR, SensorConfig
from torch import Tensor, nn

from megatron_mm.modalities.exports import Exports


class SensorExports(Exports):
    """Readings, and how many of each recording are readings."""

    modality = SENSOR
    describes, tower, projector = "sensor_config", "sensor_tower", "sensor_projector"
    inputs, takes = ("readings", "num_readings"), "sensor readings"

    def config(self, section: SensorConfig) -> dict[str, Any]:
        """Return what the config.json of a full export says of readings beside their encoder."""
        return {"sensor_window": section.window}

    def processor(self, section: SensorConfig) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Return no parts of transformers, and the settings of the processor's own."""
        return {}, {"sensor_window": section.window}

    def model_inputs(self, items: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """Return readings (num_recordings, longest, 3) and num_readings (num_recordings,)."""
        recordings = [torch.cat(list(units)) for units in items]
        return {
            "readings": nn.utils.rnn.pad_sequence(recordings, batch_first=True),
            "num_readings": torch.tensor([len(recording) for recording in recordings]),
        }


EXPORTS = SensorExports()
