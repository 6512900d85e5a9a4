"""Next-token cross-entropy as (sum, count): divided once, by the count of the whole global batch.

A mean of per-rank means is wrong as soon as ranks hold different numbers of loss-bearing tokens, which packing and
media make the rule.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mm.batch import MicroBatch
from megatron_mm.source import Source

BY_DATASET = "loss/dataset/"
"""What the name of a dataset's loss begins with."""


def sum_and_count(losses: Tensor, *, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum to minimise, number of loss-bearing tokens, cross-entropy by origin). No communication.

    Shapes: losses (2, num_tokens/cp) float32, cross-entropy and z-loss; the sum is a scalar with a gradient, the count
    an int32 scalar, the third a (num_datasets, num_sources, 2) float64 of cross-entropy sums and counts without a
    gradient.
    """
    masked = losses * micro_batch.loss_mask
    num_origins = micro_batch.num_datasets * len(Source)
    by_origin = torch.zeros(num_origins, 2, dtype=torch.float64, device=losses.device)
    sums_and_counts = torch.stack([masked[0].detach(), micro_batch.loss_mask], dim=1).double()
    by_origin.index_add_(0, micro_batch.origins, sums_and_counts)
    return masked.sum(), micro_batch.loss_mask.sum().int(), by_origin.view(-1, len(Source), 2)


def by_name(losses: Tensor, *, datasets: Sequence[str] = ()) -> dict[str, float]:
    """Return the mean loss of all tokens ('loss'), of each source ('loss/text') and of each dataset ('loss/dataset/D').

    What has no loss-bearing token has no loss and is left out, 'loss' itself too. Shapes: losses (num_datasets,
    num_sources, 2) float64 sums and counts; `datasets` are the names of the first dimension.
    """
    table = losses.view(-1, len(Source), 2)
    parts = {"loss": table.sum(dim=(0, 1))}
    parts |= {f"loss/{source.name.lower()}": table[:, source].sum(dim=0) for source in Source}
    if datasets:
        parts |= {f"{BY_DATASET}{name}": own.sum(dim=0) for name, own in zip(datasets, table, strict=True)}
    sums_and_counts = {name: part.tolist() for name, part in parts.items()}
    return {name: total / count for name, (total, count) in sums_and_counts.items() if count}
