"""Causal attention inside packed documents: the obvious form, and one launch of a flash kernel for all of them.

Every form takes the same operands: query (num_tokens/cp, heads/tp, head_dim), the positions of the spans; key and value
(num_tokens, groups, head_dim), the whole row, with heads/tp a multiple of groups; each returns the shape of the query.
None communicates.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from megatron_mm.batch import AttentionSpan
from megatron_mm.kernels import forms
from megatron_mm.kernels.attention import attention_reference, stacked_attention, stacking_pays

Attend = Callable[..., Tensor]
"""(query, key, value, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv) to the context, causal, aligned at the
end of each document."""


def torch_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend causally from the last positions of one document by torch's scaled_dot_product_attention.

    Shapes: query (num_queries, heads, head_dim); key and value (num_keys, groups, head_dim); returns the query's.
    """
    whole = query.shape[0] == key.shape[0]
    heads = query.shape[1]
    # Expanded by hand: on the CPU torch 2.14 runs the backward pass of enable_gqa on one thread a key/value head.
    key, value = (part if part.shape[1] == heads else _repeat_groups(part, heads) for part in (key, value))
    context = F.scaled_dot_product_attention(
        *(part.transpose(0, 1).unsqueeze(0) for part in (query, key, value)),  # (1, heads, length, head_dim)
        attn_mask=None if whole else _aligned_at_end(query.shape[0], key.shape[0], device=query.device),
        is_causal=whole,
    )
    return context.squeeze(0).transpose(0, 1)


def defined(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by its definition, `attention_reference`, which holds the scores of all heads."""
    return forms.defined(attention_reference, query, key, value)


def stacked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by `stacked_attention` where that is the faster one: on a CPU, with shared keys."""
    attend = stacked_attention if stacking_pays(query, key) else torch_sdpa
    return attend(query, key, value)


class DocumentAttention(nn.Module):
    """Attention document by document, on any device."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor] = torch_sdpa) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, spans: tuple[AttentionSpan, ...]) -> Tensor:
        """Return the context of each position."""
        queries = query.split([length for span in spans for length in span.query_lengths])
        keys, values = ([piece for span in spans for piece in _pieces(part, span)] for part in (key, value))
        return torch.cat([self.attend(*piece) for piece in zip(queries, keys, values)])


def _pieces(row: Tensor, span: AttentionSpan) -> tuple[Tensor, ...]:
    """Return the keys, or values, of each piece of a span."""
    return span.keys_of(row).split(span.key_lengths)


def _aligned_at_end(num_queries: int, num_keys: int, *, device: torch.device) -> Tensor:
    """Return which keys each of the last queries of a document may read: (num_queries, num_keys) bool."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def _repeat_groups(part: Tensor, heads: int) -> Tensor:
    """Return the key or value of each query head: (length, groups, head_dim) to (length, heads, head_dim)."""
    return part.unsqueeze(2).expand(-1, -1, heads // part.shape[1], -1).flatten(1, 2)


class VarlenAttention(nn.Module):
    """Attention over all documents of a span in one launch of `attend`."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, spans: tuple[AttentionSpan, ...]) -> Tensor:
        """Return the context of each position."""
        contexts = [self.attend(*operands) for operands in varlen_operands(query, key, value, spans=spans)]
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def varlen_operands(
    query: Tensor, key: Tensor, value: Tensor, *, spans: tuple[AttentionSpan, ...]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]]:
    """Yield the operands of an `Attend` for each span."""
    for own, span in zip(query.split([span.stop - span.start for span in spans]), spans):
        lengths = max(span.query_lengths), max(span.key_lengths)
        yield own, span.keys_of(key), span.keys_of(value), span.cu_seqlens_q, span.cu_seqlens_kv, *lengths


def torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_kv: Tensor, max_q: int, max_kv: int
) -> Tensor:
    """An `Attend` by the flash kernels that come with torch: BF16 on a GPU."""
    return varlen_attn(query, key, value, cu_q, cu_kv, max_q, max_kv, window_size=(-1, 0), enable_gqa=True)


def flash_attn_varlen() -> Attend:
    """Return an `Attend` by the flash-attn package: its form for Hopper where that is installed, else its form for
    Ampere. Raises ImportError where neither is."""
    try:
        from flash_attn_interface import flash_attn_varlen_func  # flash-attn 3
    except ImportError:
        from flash_attn import flash_attn_varlen_func

    def attend(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_kv: Tensor, max_q: int, max_kv: int
    ) -> Tensor:
        context = flash_attn_varlen_func(query, key, value, cu_q, cu_kv, max_q, max_kv, causal=True)
        return context[0] if isinstance(context, tuple) else context  # some versions return the log-sum-exp as well

    return attend
