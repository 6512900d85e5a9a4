"""Cross-entropy over tensor ranks, from logits and from hidden states, in all its forms beside its definition over all
of the words."""

from collections.abc import Callable

import pytest
import torch
from agreement import draw, dtypes
from launch import run_ranks
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mm.kernels.cross_entropy import (
    cross_entropy_backward,
    cross_entropy_combine,
    cross_entropy_reference,
    cross_entropy_statistics,
    linear_cross_entropy,
    vocab_parallel_cross_entropy,
)
from megatron_mm.kernels.forms import form, use

NUM_TOKENS, HIDDEN, VOCAB, CHUNK, Z_LOSS = 300, 12, 48, 128, 1e-2  # several blocks and chunks, the last one smaller


def operands() -> tuple[Tensor, ...]:
    """Return (hidden, weight, labels, mask)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(NUM_TOKENS, HIDDEN, generator=generator),
        torch.randn(VOCAB, HIDDEN, generator=generator),
    )
    hidden[::3] *= 40.0  # exp() of their logits overflows without the maximum
    labels = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    return hidden, weight, labels, (torch.arange(NUM_TOKENS) % 5 != 1).float()


def ours(chunked: bool, form: str) -> dict[str, Tensor]:
    use(form)
    hidden, weight, labels, mask = operands()
    group = dist.group.WORLD
    hidden.requires_grad_()
    weight = weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    settings = {"labels": labels, "mask": mask, "z_loss": Z_LOSS, "group": group}
    if chunked:
        losses = linear_cross_entropy(hidden, weight=weight, chunk_tokens=CHUNK, **settings)
    else:
        losses = vocab_parallel_cross_entropy(hidden @ weight.t(), **settings)
    (losses * torch.linspace(0, 1, NUM_TOKENS)).sum().backward()
    dist.all_reduce(hidden.grad)  # as the operation that gathered it would
    return {"losses": losses.detach(), "hidden": hidden.grad, "weight": weight.grad}


@pytest.mark.parametrize("chunked", [False, True], ids=["logits", "hidden states"])
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("form", ["reference", "fused"])
def test_it_is_the_reference_over_the_whole_vocabulary(form: str, ranks: int, chunked: bool) -> None:
    hidden, weight, labels, mask = operands()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    losses = cross_entropy_reference(hidden @ weight.t(), labels=labels, mask=mask, z_loss=Z_LOSS)
    (losses * torch.linspace(0, 1, NUM_TOKENS).double()).sum().backward()
    found = run_ranks(ranks, ours, chunked, form)
    for part in found:
        torch.testing.assert_close(part["losses"].double(), losses.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part["hidden"].double(), hidden.grad, rtol=1e-4, atol=1e-5)
    found_weight = torch.cat([part["weight"] for part in found])
    torch.testing.assert_close(found_weight.double(), weight.grad, rtol=1e-4, atol=1e-5)


@dtypes
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize(("shards", "shape"), [(1, (1, 1)), (1, (5, 1056)), (8, (3, 56)), (8, (9, 64)), (1, (0, 8))])
def test_cross_entropy(check: Callable, dtype: torch.dtype, shards: int, shape: tuple[int, int], masked: bool) -> None:
    rows, vocab = shape
    logits, weight = 4 * draw(dtype, rows, vocab), draw(torch.float32, 2, rows)
    logits[::3] += 64.0  # exp() of these overflows without the maximum
    labels = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(rows))
    mask = (torch.arange(rows) % 4 != 2).float() if masked else None
    leaf = logits.double().requires_grad_()
    losses = cross_entropy_reference(leaf, labels=labels, mask=mask, z_loss=Z_LOSS)
    expected = [losses.detach(), *torch.autograd.grad(losses, leaf, weight.double())]

    def case(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
        operands = place(labels), None if mask is None else place(mask)
        if form() == "reference":
            leaf = place(logits).requires_grad_()
            settings = {"labels": operands[0], "mask": operands[1], "z_loss": Z_LOSS, "group": None}
            losses = vocab_parallel_cross_entropy(leaf, **settings)
            return [losses.detach(), *torch.autograd.grad(losses, leaf, place(weight))]
        unread = logits if mask is None else logits.masked_fill(mask[:, None] == 0, torch.nan)
        parts = [part.clone() for part in place(unread).chunk(shards, dim=1)]
        firsts = range(0, vocab, vocab // shards)
        statistics = [cross_entropy_statistics(part, *operands, first) for part, first in zip(parts, firsts)]
        found, log_z = cross_entropy_combine(torch.stack(statistics), operands[1], Z_LOSS)
        for part, first in zip(parts, firsts):
            cross_entropy_backward(part, place(weight), *operands, log_z, first, Z_LOSS)
        return [found, torch.cat(parts, dim=1)]

    check(case, expected, [torch.float32, dtype])


@pytest.mark.usefixtures("on_host")
def test_a_nan_is_not_hidden() -> None:
    logits = torch.zeros(2, 64)
    logits[1, 40] = torch.nan
    losses = vocab_parallel_cross_entropy(logits, labels=torch.tensor([1, 2]), z_loss=0.0, group=None)
    assert losses[0].isnan().tolist() == [False, True]


class Largest(TorchDispatchMode):
    """While it is active, remembers the most elements that any tensor has had."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_the_chunked_form_never_holds_the_logits() -> None:
    num_tokens, hidden_size, vocab, chunk = 64, 4, 96, 16
    hidden = torch.randn(num_tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    labels = torch.randint(vocab, (num_tokens,))
    with Largest() as largest:
        losses = linear_cross_entropy(hidden, weight=weight, labels=labels, z_loss=0.0, group=None, chunk_tokens=chunk)
        losses.sum().backward()
    assert largest.numel == chunk * vocab


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_it_takes_any_number_of_tokens(num_tokens: int) -> None:
    hidden, weight = torch.randn(num_tokens, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    labels = torch.zeros(num_tokens, dtype=torch.int64)
    losses = linear_cross_entropy(hidden, weight=weight, labels=labels, z_loss=0.1, group=None)
    losses.sum().backward()
    expected = cross_entropy_reference(hidden @ weight.t(), labels=labels, mask=None, z_loss=0.1)
    torch.testing.assert_close(losses, expected)
    assert weight.grad.shape == weight.shape
