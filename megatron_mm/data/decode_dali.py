"""DALI beside the reference decoder: GPU operators for images where there is a GPU, CPU operators elsewhere.

DALI 2.4 decodes sound only: its resampler does not low-pass, and shards hold 16 kHz already.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from megatron_mm.data.decode import ReferenceDecoder
from megatron_mm.modality import IMAGE_SIZE, SAMPLE_RATE

log = logging.getLogger(__name__)

BATCH_SIZE = 64
NUM_THREADS = 2
PIPELINE = {
    "batch_size": BATCH_SIZE,
    "num_threads": NUM_THREADS,
    # One batch goes in, that batch comes out: the loader reads ahead by itself.
    "prefetch_queue_depth": 1,
    "exec_async": False,
    "exec_pipelined": False,
}


@pipeline_def(**PIPELINE)
def _image_pipeline(device: str):
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    # Shards hold upright images; the size is given whole, so that no rounding of DALI's decides the geometry.
    pixels = fn.decoders.image(encoded, device=device, output_type=types.RGB, adjust_orientation=False)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return fn.resize(pixels, size=size, interp_type=types.INTERP_CUBIC, antialias=True)


@pipeline_def(**PIPELINE)
def _sound_pipeline():
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    waveform, rate = fn.decoders.audio(encoded, dtype=types.FLOAT, downmix=True)
    return waveform, rate


class DaliDecoder:
    """DALI's pipelines; what they refuse goes to the reference.

    One bad item ends a DALI pipeline, so a batch that fails is halved until the bad one stands alone, in new pipelines.
    """

    def __init__(self, *, device_id: int | None = None) -> None:
        self.name = "DALI on the CPU" if device_id is None else "DALI on the GPU"
        self.reference = ReferenceDecoder()
        device = "cpu" if device_id is None else "mixed"
        self._images = _Runner(lambda: _image_pipeline(device, device_id=device_id))
        self._sounds = _Runner(lambda: _sound_pipeline(device_id=None))

    def images(self, encoded: Sequence[bytes]) -> list[Tensor | None]:
        """Return each image squashed to 224 x 224, (3, 224, 224) uint8."""
        decoded = [output and torch.from_numpy(output[0]) for output in self._images(encoded)]
        pixels = [None if image is None else image.permute(2, 0, 1).contiguous() for image in decoded]
        return _fill(pixels, encoded, self.reference.images, what="images")

    def recordings(self, encoded: Sequence[bytes]) -> list[Tensor | None]:
        """Return the waveform of each 16 kHz recording, (num_samples,) float32 in [-1, 1]."""
        outputs = self._sounds(encoded)
        waveforms = [
            torch.from_numpy(output[0].reshape(-1)) if output and output[1] == SAMPLE_RATE else None
            for output in outputs
        ]
        return _fill(waveforms, encoded, self.reference.recordings, what="recordings")


class _Runner:
    """A pipeline, built when it is first used and again after it failed."""

    def __init__(self, build: Callable[[], Pipeline]) -> None:
        self._build = build
        self._pipeline: Pipeline | None = None

    def __call__(self, encoded: Sequence[bytes]) -> list[tuple[np.ndarray, ...] | None]:
        """Return the outputs of each item, None where DALI refuses it."""
        outputs: list[tuple[np.ndarray, ...] | None] = []
        for start in range(0, len(encoded), BATCH_SIZE):
            outputs += self._run([np.frombuffer(data, np.uint8) for data in encoded[start : start + BATCH_SIZE]])
        return outputs

    def _run(self, batch: list[np.ndarray]) -> list[tuple[np.ndarray, ...] | None]:
        if not all(item.size for item in batch):  # an empty input is refused without an error that names it
            return [self._run([item])[0] if item.size else None for item in batch]
        if self._pipeline is None:
            self._pipeline = self._build()
            self._pipeline.build()
        try:
            self._pipeline.feed_input("encoded", batch)
            outputs = [output.as_cpu() for output in self._pipeline.run()]
            return [tuple(np.array(output.at(index)) for output in outputs) for index in range(len(batch))]
        except RuntimeError:
            self._pipeline = None
        if len(batch) == 1:
            return [None]
        middle = len(batch) // 2
        return [*self._run(batch[:middle]), *self._run(batch[middle:])]


def _fill(
    decoded: list[Tensor | None],
    encoded: Sequence[bytes],
    reference: Callable[[Sequence[bytes]], list[Tensor | None]],
    *,
    what: str,
) -> list[Tensor | None]:
    """Let the reference decode what DALI refused, and say how much that was."""
    refused = [index for index, item in enumerate(decoded) if item is None]
    if refused:
        log.warning("DALI refuses %d of %d %s: the reference decodes them", len(refused), len(decoded), what)
        for index, item in zip(refused, reference([encoded[index] for index in refused]), strict=True):
            decoded[index] = item
    return decoded
