"""Token rows and the assembly of decoder inputs in all their forms beside their definitions."""

from collections.abc import Callable

import pytest
import torch
from agreement import beside, draw, dtypes
from torch import Tensor

from megatron_mm.kernels.embedding import (
    assemble_embeddings,
    assemble_embeddings_reference,
    token_rows,
    token_rows_reference,
)


@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (6, 1056, 2), (0, 8, 0), (20, 8, 0), (20, 16, 9)], ids=str)
def test_assemble_embeddings(check: Callable, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, columns, num_media = shape
    leaves = [draw(dtype, rows, columns), draw(dtype, columns), draw(dtype, num_media, columns)]
    positions = torch.randperm(rows, generator=torch.Generator().manual_seed(1))[:num_media]

    def over(assemble: Callable) -> Callable:
        return lambda tokens, text_type, features, positions: assemble(
            tokens, text_type=text_type, features=features, positions=positions
        )

    check(*beside(over(assemble_embeddings_reference), over(assemble_embeddings), leaves, positions=positions))


@dtypes
@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize(
    ("shape", "ids"),
    [((1, 1), 8), ((32, 5), 1), ((33, 16), 1), ((70, 8), 24), ((97, 16), 2), ((0, 8), 8)],
    ids=["one", "one whole tile", "one run over tiles", "many", "two long runs", "empty"],
)
def test_token_rows(check: Callable, dtype: torch.dtype, shape: tuple[int, int], ids: int, shards: int) -> None:
    rows, columns = shape
    vocab = 24
    tokens = torch.randint(ids, (rows,), generator=torch.Generator().manual_seed(rows)) * (vocab // ids)
    size = vocab // shards

    def of_all_ranks(table: Tensor, ids: Tensor) -> Tensor:
        firsts = range(0, vocab, size)
        parts = [token_rows(table[first : first + size], ids=ids, first_id=first) for first in firsts]
        return torch.stack(parts).sum(0)  # one rank's row and zeros: the sum is exact

    def looked_up(table: Tensor, ids: Tensor) -> Tensor:
        return table[ids]

    check(*beside(looked_up, of_all_ranks, [draw(dtype, vocab, columns)], ids=tokens))


def test_the_definition_gives_zeros_for_ids_of_other_ranks() -> None:
    rows = token_rows_reference(torch.ones(2, 3), ids=torch.tensor([3, 4, 5, 6]), first_id=4)
    assert rows.tolist() == [[0.0] * 3, [1.0] * 3, [1.0] * 3, [0.0] * 3]
