"""Cross-entropy over a vocabulary that is cut into tensor ranks' parts, against torch's own over the whole of it."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import run_ranks

from megatron_mm.model.loss import vocab_parallel_cross_entropy

VOCAB_SIZE = 24


def operands(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    logits = 5 * torch.randn(num_tokens, VOCAB_SIZE, generator=generator)
    logits[::3] += 80.0  # exp() of these overflows without the maximum
    return (
        logits,
        torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator),
        torch.rand(num_tokens, generator=generator),
    )


def ours(num_tokens: int, z_loss: float) -> dict[str, torch.Tensor]:
    logits, labels, weight = operands(num_tokens)
    group = dist.group.WORLD
    shard = logits.chunk(group.size(), dim=1)[group.rank()].clone().requires_grad_()
    cross_entropy, z = vocab_parallel_cross_entropy(shard * 1.0, labels, z_loss=z_loss, group=group)
    ((cross_entropy + z) * weight).sum().backward()
    return {"cross_entropy": cross_entropy.detach(), "z": z.detach(), "gradient": shard.grad}


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("num_tokens", [1, 37])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_it_is_torchs_cross_entropy(ranks: int, num_tokens: int, z_loss: float) -> None:
    logits, labels, weight = operands(num_tokens)
    logits = logits.double().requires_grad_()
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    z = z_loss * logits.logsumexp(dim=-1).square()
    ((cross_entropy + z) * weight).sum().backward()
    found = run_ranks(ranks, ours, num_tokens, z_loss)
    for part in found:
        torch.testing.assert_close(part["cross_entropy"].double(), cross_entropy.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part["z"].double(), z.detach(), rtol=1e-5, atol=1e-7)
    gradient = torch.cat([part["gradient"] for part in found], dim=1)
    torch.testing.assert_close(gradient.double(), logits.grad, rtol=1e-4, atol=1e-6)
