"""Inputs of the decoder: rows of an embedding table that is cut over ranks, and media features in their places.

Neither has a fused form: their definitions run in its place.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mm.kernels import native
from megatron_mm.kernels.forms import Draw, Example, defined, form, operator, packed

TILE = 32
"""Sorted rows of one block of token_rows' backward pass."""


def token_rows(table: Tensor, *, ids: Tensor, first_id: int) -> Tensor:
    """Return the rows of this rank's part of an embedding table by the form that runs; see `token_rows_reference`."""
    if form() == "native":
        return token_rows_native(table, ids, first_id)
    if form() == "reference":
        return defined(token_rows_reference, table, ids=ids, first_id=first_id)
    return token_rows_reference(table, ids=ids, first_id=first_id)


def token_rows_reference(table: Tensor, *, ids: Tensor, first_id: int) -> Tensor:
    """Return the rows of `table` that `ids` name, and zeros for ids of other ranks.

    Shapes: table (vocab/tp, hidden), the rows from first_id on; ids (num_tokens,) int64; returns (num_tokens, hidden).
    """
    local = ids - first_id
    elsewhere = (local < 0) | (local >= table.shape[0])
    return F.embedding(local.masked_fill(elsewhere, 0), table).masked_fill(elsewhere.unsqueeze(-1), 0.0)


@operator("token_rows")
def token_rows_native(table: Tensor, ids: Tensor, first_id: int) -> Tensor:
    """Return the rows of `table` that `ids` name, zeros where another rank holds them."""
    table, ids = table.contiguous(), ids.contiguous()
    vocab, columns = table.shape
    out = table.new_empty(ids.shape[0], columns)
    bf16 = native.is_bf16(table)
    native.run("token_rows_forward", bf16, ids.shape[0], columns, vocab, first_id, table, ids, out)
    return out


@operator("token_rows_backward")
def token_rows_native_backward(gradient: Tensor, ids: Tensor, first_id: int, vocab: int) -> Tensor:
    """Return the gradient of the table."""
    gradient = gradient.contiguous()
    rows, columns = gradient.shape
    sorted_ids, order = ids.sort(stable=True)
    table = gradient.new_zeros(vocab, columns)
    carries = native.empty_fp32(2, -(-rows // TILE), columns, like=gradient)
    native.run(
        *("token_rows_backward", native.is_bf16(gradient), rows, columns, vocab, first_id),
        *(gradient, sorted_ids, order, table, carries),
    )
    return table


@token_rows_native.register_fake
def _(table: Tensor, ids: Tensor, first_id: int) -> Tensor:
    return table.new_empty(ids.shape[0], table.shape[1])


@token_rows_native_backward.register_fake
def _(gradient: Tensor, ids: Tensor, first_id: int, vocab: int) -> Tensor:
    return gradient.new_empty(vocab, gradient.shape[1])


def _keep_ids(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.first_id, ctx.vocab = inputs[2], inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _table_gradient(ctx: Any, gradient: Tensor) -> tuple:
    return token_rows_native_backward(gradient, *ctx.saved_tensors, ctx.first_id, ctx.vocab), None, None


token_rows_native.register_autograd(_table_gradient, setup_context=_keep_ids)


def assemble_embeddings(tokens: Tensor, *, text_type: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Assemble decoder inputs by the form that runs; see `assemble_embeddings_reference`."""
    if form() == "native":
        return assemble_native(tokens, text_type, features, media_rows(tokens, positions))
    operands = {"text_type": text_type, "features": features, "positions": positions}
    if form() == "reference":
        return defined(assemble_embeddings_reference, tokens, **operands)
    return assemble_embeddings_reference(tokens, **operands)


def assemble_embeddings_reference(tokens: Tensor, *, text_type: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Return decoder inputs: text rows plus their modality-type embedding, media features over their placeholders.

    Shapes: tokens (num_tokens, hidden), the token embedding of every position; text_type (hidden,); features
    (num_media_tokens, hidden), projected and carrying their own type embedding; positions (num_media_tokens,) int64,
    distinct rows of `tokens`; returns a new (num_tokens, hidden). No communication: a rank assembles the rows it owns.
    """
    return (tokens + text_type).index_copy(0, positions, features)


def media_rows(tokens: Tensor, positions: Tensor) -> Tensor:
    """Return which feature stands in each of the rows `tokens`: (num_tokens,) int32, -1 for none."""
    rows = torch.full((tokens.shape[0],), -1, dtype=torch.int32, device=tokens.device)
    return rows.index_copy(0, positions, torch.arange(positions.numel(), dtype=torch.int32, device=tokens.device))


@operator("assemble_forward")
def assemble_native(tokens: Tensor, text_type: Tensor, features: Tensor, media_row: Tensor) -> Tensor:
    """Return decoder inputs; media_row (num_tokens,) int32 is the feature of each row, -1 for text."""
    tokens, text_type, features = (tensor.contiguous() for tensor in (tokens, text_type, features))
    out = torch.empty_like(tokens)
    bf16 = native.is_bf16(tokens)
    native.run("assemble_forward", bf16, *tokens.shape, tokens, text_type, features, media_row, out)
    return out


@operator("assemble_backward")
def assemble_native_backward(gradient: Tensor, media_row: Tensor, num_media: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (token rows, text type, features)."""
    gradient = gradient.contiguous()
    rows, columns = gradient.shape
    blocks = min(rows, native.BLOCKS)
    tokens, features = torch.empty_like(gradient), gradient.new_empty(num_media, columns)
    partials = native.empty_fp32(blocks, columns, like=gradient)
    native.run(
        *("assemble_backward", native.is_bf16(gradient), rows, columns, blocks, gradient, media_row),
        *(tokens, features, partials),
    )
    return tokens, partials.sum(0).to(gradient.dtype), features


@assemble_native.register_fake
def _(tokens: Tensor, text_type: Tensor, features: Tensor, media_row: Tensor) -> Tensor:
    return packed(tokens)


@assemble_native_backward.register_fake
def _(gradient: Tensor, media_row: Tensor, num_media: int) -> tuple[Tensor, Tensor, Tensor]:
    columns = gradient.shape[1]
    return packed(gradient), gradient.new_empty(columns), gradient.new_empty(num_media, columns)


def _keep_places(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.num_media = inputs[2].shape[0]
    ctx.save_for_backward(inputs[3])


def _parts_gradient(ctx: Any, gradient: Tensor) -> tuple:
    return *assemble_native_backward(gradient, *ctx.saved_tensors, ctx.num_media), None


assemble_native.register_autograd(_parts_gradient, setup_context=_keep_places)


def examples(draw: Draw) -> Iterator[Example]:
    """Yield the calls that the check at start-up makes."""
    tokens, features, table = draw(24, 64), draw(6, 64), draw(40, 64)
    positions = torch.tensor([4, 8, 7, 6, 3, 5], device=tokens.device)
    ids = (torch.arange(24, device=tokens.device) * 7) % 60  # some twice, some of another rank

    def assemble(tokens: Tensor, text_type: Tensor, features: Tensor) -> Tensor:
        return assemble_embeddings(tokens, text_type=text_type, features=features, positions=positions)

    yield assemble, [tokens, draw(64), features]
    yield lambda table: token_rows(table, ids=ids, first_id=10), [table]
