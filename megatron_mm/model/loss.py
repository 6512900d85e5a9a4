"""Next-token cross-entropy as (sum, count): divided once, by the count of the whole global batch.

A mean of per-rank means is wrong as soon as ranks hold different numbers of loss-bearing tokens, which packing and
media make the rule.
"""

import torch
from torch import Tensor

from megatron_mm.batch import MicroBatch
from megatron_mm.modality import Source


def sum_and_count(losses: Tensor, *, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum to minimise, number of loss-bearing tokens, cross-entropy by source). No communication.

    Shapes: losses (2, num_tokens/cp) float32, cross-entropy and z-loss; the sum is a scalar with a gradient, the count
    an int32 scalar, the third a (num_sources, 2) float64 of cross-entropy sums and counts without a gradient.
    """
    masked = losses * micro_batch.loss_mask
    by_source = torch.zeros(len(Source), 2, dtype=torch.float64, device=losses.device)
    sums_and_counts = torch.stack([masked[0].detach(), micro_batch.loss_mask], dim=1).double()
    by_source.index_add_(0, micro_batch.sources, sums_and_counts)
    return masked.sum(), micro_batch.loss_mask.sum().int(), by_source


def by_name(by_source: Tensor) -> dict[str, float]:
    """Return the mean loss of all tokens ('loss') and of each source that has any ('loss/text', ...)."""
    sums, counts = by_source.unbind(dim=1)
    means = {"loss": (sums.sum() / counts.sum().clamp(min=1)).item()}
    for source in Source:
        if counts[source] > 0:
            means[f"loss/{source.name.lower()}"] = (sums[source] / counts[source]).item()
    return means
