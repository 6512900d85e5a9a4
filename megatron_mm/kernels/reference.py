"""What each kernel means, in a few lines of torch: the definition that every faster form is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def assemble_embeddings(tokens: Tensor, *, text_type: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Return decoder inputs: text rows plus their modality-type embedding, media features over their placeholders.

    Shapes: tokens (num_tokens, hidden), the token embedding of every position; text_type (hidden,); features
    (num_media_tokens, hidden), projected and carrying their own type embedding; positions (num_media_tokens,) int64,
    distinct rows of `tokens`; returns a new (num_tokens, hidden). No communication: a rank assembles the rows it owns.
    """
    return (tokens + text_type).index_copy(0, positions, features)


def rotate(heads: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `heads` turned by the angle of each position: rotary embedding, non-interleaved (Su et al. 2021; Llama).

    Shapes: heads (num_tokens, num_heads, head_dim); cos, sin (num_tokens, 1, head_dim/2); returns the shape of heads.
    """
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020).

    Shapes: gate_and_up (..., 2 ffn_hidden), the gate first; returns (..., ffn_hidden).
    """
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def token_rows(table: Tensor, *, ids: Tensor, first_id: int) -> Tensor:
    """Return the rows of `table` that `ids` name, and zeros for ids of other ranks.

    Shapes: table (vocab/tp, hidden), the rows from first_id on; ids (num_tokens,) int64; returns (num_tokens, hidden).
    """
    local = ids - first_id
    elsewhere = (local < 0) | (local >= table.shape[0])
    return F.embedding(local.masked_fill(elsewhere, 0), table).masked_fill(elsewhere.unsqueeze(-1), 0.0)


def rms_norm(hidden: Tensor, *, weight: Tensor, epsilon: float) -> Tensor:
    """Return hidden / rms(hidden) * weight over the last dimension (Zhang and Sennrich 2019); shape of hidden."""
    return hidden * (hidden.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt() * weight


def add_rms_norm(hidden: Tensor, *, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return (norm of the sum, sum) of hidden and residual; each of their shape."""
    total = hidden + residual
    return rms_norm(total, weight=weight, epsilon=epsilon), total


def mqa_rope(
    query: Tensor,
    *,
    key_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (query, key, value) of attention: keys and values apart, queries and keys normed and turned.

    Shapes: query (num_tokens, heads/tp, head_dim); key_value (num_tokens, groups, 2, head_dim); cos, sin (num_tokens,
    head_dim/2) of each token's position in its document; the weights (head_dim,), or None for no norm.
    """
    key, value = key_value.unbind(dim=2)
    if query_weight is not None:
        query = rms_norm(query, weight=query_weight, epsilon=epsilon)
        key = rms_norm(key, weight=key_weight, epsilon=epsilon)
    angles = {"cos": cos.unsqueeze(1), "sin": sin.unsqueeze(1)}  # (num_tokens, 1, head_dim/2)
    return rotate(query, **angles), rotate(key, **angles), value


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the causal attention of the last positions of one document (Vaswani et al. 2017).

    Head h of the queries reads group h * groups // heads of the keys (Shazeer 2019). Shapes: query (num_queries, heads,
    head_dim); key and value (num_keys, groups, head_dim), num_keys >= num_queries; returns the shape of the query.
    """
    shared = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(shared, dim=1) for part in (key, value))  # (num_keys, heads, head_dim)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[2] ** 0.5
    first = key.shape[0] - query.shape[0]  # the position of the first query
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(first + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, float("-inf")).softmax(dim=-1), value)


def cross_entropy(logits: Tensor, *, labels: Tensor, mask: Tensor | None, z_loss: float) -> Tensor:
    """Return cross-entropy and z_loss log(Z)^2 of each token, Z the softmax's denominator; 0 where mask is 0.

    Shapes: logits (num_tokens, vocab), the whole vocabulary; labels, mask (num_tokens,); returns (2, num_tokens).
    """
    losses = torch.stack(
        [F.cross_entropy(logits, labels, reduction="none"), z_loss * logits.logsumexp(dim=-1).square()]
    )
    return losses if mask is None else losses.masked_fill(mask == 0, 0.0)
