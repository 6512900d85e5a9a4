"""Multi- and grouped-query attention that communicates only what it must under tensor parallelism.

megatron-core 0.19.2, when there are fewer key/value heads than tensor ranks, shards the fused QKV weight, all-gathers
the whole QKV activation and throws most of it away. Here the query weight is sharded by heads and the key/value weight
is replicated and applied to the sequence shard: only keys and values are gathered.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from megatron_mm.batch import AttentionSpan
from megatron_mm.kernels.fused import rotate


@dataclass
class PackedDocuments(PackedSeqParams):
    """What travels through megatron-core's layers to the attention: the spans of the micro-batch."""

    spans: tuple[AttentionSpan, ...] = ()


class ReplicatedLinear(nn.Module):
    """A linear layer whose weight every tensor rank holds whole and applies to its own sequence shard.

    Its gradient is partial over the sequence, so the weight is marked `sequence_parallel`: finalize_model_grads sums
    it over the tensor ranks once a step.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """Return (hidden @ weight.T, no bias), as megatron-core's linear layers do. No communication."""
        return F.linear(hidden, self.weight), None


class DocumentAttention(nn.Module):
    """Causal attention inside each packed document, by torch's scaled_dot_product_attention."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, spans: tuple[AttentionSpan, ...]) -> Tensor:
        """Return the context of each position. No communication.

        Shapes: query (num_tokens/cp, heads/tp, head_dim), the positions of the spans; key, value (num_tokens, groups,
        head_dim), the whole row, with heads/tp a multiple of groups; returns (num_tokens/cp, heads/tp, head_dim).
        """
        queries = query.split([length for span in spans for length in span.query_lengths])
        keys, values = ([piece for span in spans for piece in _pieces(part, span)] for part in (key, value))
        return torch.cat([_attend(*piece) for piece in zip(queries, keys, values)])


def _pieces(row: Tensor, span: AttentionSpan) -> tuple[Tensor, ...]:
    """Return the keys, or values, of each piece of a span."""
    own = row if (span.key_start, span.stop) == (0, row.shape[0]) else row[span.key_start : span.stop]
    return own.split(span.key_lengths)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend causally from the last positions of one document: (num_queries, heads, head_dim), as the query has it."""
    whole = query.shape[0] == key.shape[0]
    heads = query.shape[1]
    # Expanded by hand: on the CPU torch 2.14 runs the backward pass of enable_gqa on one thread a key/value head.
    key, value = (part if part.shape[1] == heads else _repeat_groups(part, heads) for part in (key, value))
    context = F.scaled_dot_product_attention(
        *(part.transpose(0, 1).unsqueeze(0) for part in (query, key, value)),  # (1, heads, length, head_dim)
        attn_mask=None if whole else causal_lower_right(query.shape[0], key.shape[0]),
        is_causal=whole,
    )
    return context.squeeze(0).transpose(0, 1)


def _repeat_groups(part: Tensor, heads: int) -> Tensor:
    """Return the key or value of each query head: (length, groups, head_dim) to (length, heads, head_dim)."""
    return part.unsqueeze(2).expand(-1, -1, heads // part.shape[1], -1).flatten(1, 2)


def gather_row(local: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """Return the whole row of which each context rank holds the spans of `batch.context_spans`.

    Shapes: local (num_tokens/cp, ...); returns (num_tokens, ...). Collective over cp: an all-gather, and in the
    backward pass a reduce-scatter.
    """
    if group.size() == 1:
        return local
    gathered = tensor_parallel.gather_from_sequence_parallel_region(local, True, group)
    chunks = gathered.unflatten(0, (group.size(), 2, -1))  # (cp, 2, num_tokens/cp/2, ...)
    return torch.cat([chunks[:, 0], chunks[:, 1].flip(0)]).flatten(0, 1)


@dataclass
class AttentionSubmodules:
    """What attention is made of; a backend chooses the classes."""

    linear_q: Callable[..., nn.Module]
    linear_proj: Callable[..., nn.Module]
    core_attention: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]


class GroupedQueryAttention(MegatronModule):
    """Self-attention with `num_query_groups` key/value heads, from one (multi-query) to one a query head.

    With at least as many groups as tensor ranks, keys and values are sharded by groups like the queries. With fewer,
    their weight is replicated, applied to the sequence shard, and the result all-gathered over tp: each rank keeps the
    group that its query heads read.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: AttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.head_dim = config.kv_channels
        self.groups = config.num_query_groups
        self.shards_groups = self.groups % self.tp_group.size() == 0
        query_size = config.num_attention_heads * self.head_dim
        key_value_size = 2 * self.groups * self.head_dim
        column = {"config": config, "init_method": config.init_method, "bias": False, "gather_output": False}
        column |= {"skip_bias_add": False, "is_expert": False, "tp_comm_buffer_name": "qkv", "tp_group": self.tp_group}
        self.linear_q = submodules.linear_q(config.hidden_size, query_size, **column)
        # Rows of linear_kv: for each group its key, then its value, so that a shard of rows is a set of whole groups.
        if self.shards_groups:
            self.linear_kv = submodules.linear_q(config.hidden_size, key_value_size, **column)
        else:
            self.linear_kv = ReplicatedLinear(config.hidden_size, key_value_size, config=config)
        self.query_norm, self.key_norm = (
            submodules.norm(config, self.head_dim, config.layernorm_epsilon) if config.qk_layernorm else None
            for _ in range(2)
        )
        self.core_attention = submodules.core_attention()
        self.recompute_core = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        self.linear_proj = submodules.linear_proj(
            query_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.tp_group,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedDocuments,
        **inference: None,
    ) -> tuple[Tensor, None]:
        """Return (attention output, no bias). Collective over tp and cp: gathers hidden states, and keys and values.

        Shapes: hidden_states (num_tokens/cp/tp, 1, hidden); rotary_pos_emb (2, num_tokens/cp, 1, head_dim/2), the
        cosine and sine of each position's angles; returns (num_tokens/cp/tp, 1, hidden).
        """
        assert attention_mask is None and all(value is None for value in inference.values()), "training only"
        query = self.linear_q(hidden_states)[0]
        query = query.view(query.shape[0], -1, self.head_dim)  # (num_tokens/cp, heads/tp, head_dim)
        key, value = self._keys_and_values(hidden_states)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        cos, sin = rotary_pos_emb.to(query.dtype)
        query, key = (rotate(part, cos=cos, sin=sin) for part in (query, key))
        if self.cp_group.size() > 1:
            key, value = gather_row(torch.stack([key, value], dim=1), group=self.cp_group).unbind(dim=1)

        def core(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.core_attention(query, key, value, spans=packed_seq_params.spans)

        if self.recompute_core and self.training:
            context = tensor_parallel.checkpoint(core, False, query, key, value)
        else:
            context = core(query, key, value)
        return self.linear_proj(context.reshape(context.shape[0], 1, -1))

    def _keys_and_values(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that this rank's heads read, each (num_tokens/cp, groups, head_dim)."""
        key_value = self.linear_kv(hidden_states)[0]
        if not self.shards_groups:
            key_value = tensor_parallel.gather_from_sequence_parallel_region(key_value, True, self.tp_group)
        key_value = key_value.view(key_value.shape[0], -1, 2, self.head_dim)
        if not self.shards_groups and self.groups > 1:
            own = self.tp_group.rank() * self.groups // self.tp_group.size()
            key_value = key_value[:, own : own + 1]
        return key_value.unbind(dim=2)
