"""The loss on held-out documents."""

import numpy as np
import torch
from torch import Tensor

from megatron_mm.data.loader import Loader
from megatron_mm.modality import Source
from megatron_mm.training.state import TrainState, settle_parameters
from megatron_mm.training.step import run_micro_batches


def evaluate(state: TrainState, loader: Loader) -> Tensor:
    """Return the loss on evaluation.samples samples of `loader`: (num_datasets, num_sources, 2) sums and counts.

    The samples are the same at every evaluation and in every layout; the last batch is filled with empty ones.
    Collective over all ranks.
    """
    config = state.config
    batch_size = config.training.global_batch_size
    samples = spread(loader.num_samples, most=config.evaluation.samples)
    samples = np.append(samples, np.full(-len(samples) % batch_size, -1))
    losses = torch.zeros(len(loader.datasets), len(Source), 2, dtype=torch.float64)
    settle_parameters(state)
    for model in state.models:
        model.eval()
    with torch.no_grad():
        for batch in samples.reshape(-1, batch_size):
            losses += run_micro_batches(state, loader.micro_batches(batch), forward_only=True).losses
    return losses


def spread(num_samples: int, *, most: int) -> np.ndarray:
    """Return all samples, or `most` of them at even distances: datasets, end to end, are drawn from by their size."""
    count = min(most, num_samples)
    return np.arange(count) * num_samples // max(1, count)
