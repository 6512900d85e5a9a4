"""Attention in the forms that run on a CPU beside its definition, forward and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_mm.batch import attention_spans
from megatron_mm.kernels import attention
from megatron_mm.kernels.attention import attention_reference, stacked_attention, stacking_pays
from megatron_mm.model import core_attention
from megatron_mm.model.core_attention import DocumentAttention

SHAPES = [(1, 1, 4, 1, 8), (70, 70, 4, 1, 8), (65, 130, 8, 2, 16), (3, 200, 4, 4, 8), (512, 512, 6, 1, 64)]
"""num_queries, num_keys, heads, groups, head_dim."""


def operands(
    num_queries: int, num_keys: int, heads: int, groups: int, head_dim: int, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (num_queries, heads, head_dim), (num_keys, groups, head_dim), (num_keys, groups, head_dim)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("attend", [stacked_attention, core_attention.torch_sdpa])
def test_it_is_what_the_definition_says(
    attend: Callable, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    leaves = operands(*shape, dtype)
    results = []
    for form in (attend, attention_reference):
        context = form(*leaves)
        weights = torch.linspace(-1, 1, context.numel(), dtype=dtype).view_as(context)
        results.append([context, *torch.autograd.grad(context, leaves, weights)])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("positions", [1, 7, 64])
def test_blocks_do_not_change_what_it_computes(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = operands(65, 130, 8, 2, 16, torch.float64)
    whole = stacked_attention(*leaves)
    monkeypatch.setattr(attention, "MAX_POSITIONS", positions)
    torch.testing.assert_close(stacked_attention(*leaves), whole, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(attention, "SCRATCH_ELEMENTS", 1)
    torch.testing.assert_close(stacked_attention(*leaves), whole, rtol=1e-12, atol=1e-12)


def test_it_keeps_only_its_operands() -> None:
    kept: list[Tensor] = []
    leaves = operands(70, 70, 4, 1, 8, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        stacked_attention(*leaves)
    assert [saved.data_ptr() for saved in kept] == [leaf.data_ptr() for leaf in leaves]


def test_it_is_taken_on_a_cpu_where_enough_heads_share_a_key() -> None:
    def pays(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> bool:
        query, key, _ = operands(*shape, dtype)
        return stacking_pays(query.to(device), key.to(device))

    assert pays(512, 512, 8, 1, 64)
    assert pays(100, 512, 16, 2, 64)
    assert not pays(512, 512, 8, 1, 64, dtype=torch.bfloat16)
    assert not pays(512, 512, 8, 1, 64, device="meta")
    assert not pays(512, 512, 8, 8, 64)
    assert not pays(513, 513, 8, 1, 64)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_documents_take_the_form_that_pays(cp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three documents, the long and the short one go to torch's kernel, under context parallelism by its pieces."""
    taken: list[int] = []

    def attend(*parts: Tensor) -> Tensor:
        taken.append(parts[1].shape[0])
        return stacked_attention(*parts)

    monkeypatch.setattr(core_attention, "stacked_attention", attend)
    row = torch.randn(3, 1120, 8, 64, generator=torch.Generator().manual_seed(0))
    for rank in range(cp_size):
        spans = attention_spans((20, 500, 600), cp_rank=rank, cp_size=cp_size)
        own = torch.cat([row[0, span.start : span.stop] for span in spans])
        found, expected = (
            DocumentAttention(form)(own, row[1, :, :1], row[2, :, :1], spans=spans)
            for form in (core_attention.stacked, core_attention.torch_sdpa)
        )
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert taken
    assert all(384 <= keys <= 512 for keys in taken)
