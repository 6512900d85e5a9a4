"""Files of sensor readings: lines of three numbers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mm.errors import DataError
from megatron_mm.ingest.document import MediaSegment
from megatron_mm.ingest.kinds import Parts


@dataclass(frozen=True)
class SensorSegment(MediaSegment):
    """Readings as little-endian float32."""

    modality = "sensor"


def read_sensor(path: Path) -> Parts:
    """Return the readings in a file. Raises DataError if a line is not three numbers."""
    try:
        readings = np.loadtxt(path, delimiter=",", dtype="<f4", ndmin=2)
    except ValueError as error:
        raise DataError(f"it is no table of readings: {error}") from error
    if readings.shape[1] != 3:
        raise DataError(f"its lines have {readings.shape[1]} numbers: a reading is 3")
    return [SensorSegment(readings.tobytes())], []
