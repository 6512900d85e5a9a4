"""DALI's pipelines, one a modality, which decode a batch of items; the only module that imports DALI."""

from collections.abc import Callable, Sequence

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

__all__ = ["BATCH_SIZE", "DaliDecoder", "Pipeline", "encoded", "fn", "pipeline", "types"]

BATCH_SIZE = 64
NUM_THREADS = 2

pipeline = pipeline_def(
    batch_size=BATCH_SIZE,
    num_threads=NUM_THREADS,
    # One batch goes in, that batch comes out: the loader reads ahead by itself.
    prefetch_queue_depth=1,
    exec_async=False,
    exec_pipelined=False,
)
"""Makes a function that describes operators one that builds their pipeline."""


def encoded() -> object:
    """Return the operator that gives a pipeline the bytes of its items."""
    return fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)


class DaliDecoder:
    """A pipeline, built when it is first used and again after it failed.

    One bad item ends a DALI pipeline, so a batch that fails is halved until the bad one stands alone, in new pipelines.
    """

    def __init__(
        self,
        build: Callable[[], Pipeline],
        to_tensor: Callable[[tuple[np.ndarray, ...]], Tensor | None],
        *,
        on_gpu: bool,
    ) -> None:
        self.name = "DALI on the GPU" if on_gpu else "DALI on the CPU"
        self._build, self._to_tensor = build, to_tensor
        self._pipeline: Pipeline | None = None

    def __call__(self, encoded: Sequence[bytes]) -> list[Tensor | None]:
        """Return each item as a tensor, None where DALI refuses it."""
        decoded: list[Tensor | None] = []
        for start in range(0, len(encoded), BATCH_SIZE):
            outputs = self._run([np.frombuffer(data, np.uint8) for data in encoded[start : start + BATCH_SIZE]])
            decoded += [None if output is None else self._to_tensor(output) for output in outputs]
        return decoded

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
