"""Next-token cross-entropy as (sum, count): divided once, by the count of the whole global batch.

A mean of per-rank means is wrong as soon as ranks hold different numbers of loss-bearing tokens, which packing and
media make the rule.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm.batch import MicroBatch
from megatron_mm.modality import Source


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, *, z_loss: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return (cross-entropy, z_loss log(Z)^2) of each position; only the sum of both is what a gradient should flow to.

    Z is the softmax's denominator; the penalty keeps logits near zero (Chowdhery et al. 2022, PaLM, section 5).
    Shapes: logits (num_tokens, vocab/tp), destroyed; labels (num_tokens,) ids; returns two (num_tokens,) float32.
    Collective over tp: two all-reduces of a number or two a token, where megatron-core 0.19.2 has three.
    """
    return _VocabParallelCrossEntropy.apply(logits.float(), labels, z_loss, group)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Holds one (num_tokens, vocab/tp) buffer: logits, then exponentials, then the gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, z_loss: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        highest = logits.amax(dim=-1)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        logits = logits.detach().sub_(highest.unsqueeze(-1))
        local = labels - group.rank() * logits.shape[1]
        elsewhere = (local < 0) | (local >= logits.shape[1])
        local = local.masked_fill(elsewhere, 0).unsqueeze(-1)
        label_logit = logits.gather(-1, local).squeeze(-1).masked_fill_(elsewhere, 0.0)
        exponentials = logits.exp_()
        sums = torch.stack([exponentials.sum(dim=-1), label_logit])
        dist.all_reduce(sums, group=group)
        denominator, label_logit = sums
        log_denominator = denominator.log()
        log_z = log_denominator + highest
        ctx.z_loss = z_loss
        ctx.save_for_backward(exponentials, denominator, log_z, local, elsewhere)
        return log_denominator - label_logit, z_loss * log_z.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, z_gradient: Tensor) -> tuple[Tensor, None, None, None]:
        exponentials, denominator, log_z, local, elsewhere = ctx.saved_tensors
        scale = gradient + z_gradient * (2.0 * ctx.z_loss) * log_z
        logits_gradient = exponentials.mul_((scale / denominator).unsqueeze(-1))
        return (
            logits_gradient.scatter_add_(-1, local, -gradient.masked_fill(elsewhere, 0.0).unsqueeze(-1)),
            None,
            None,
            None,
        )


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
