"""Multi- and grouped-query attention that communicates only what it must under tensor parallelism.

megatron-core 0.19.2, when there are fewer key/value heads than tensor ranks, shards the fused QKV weight, all-gathers
the whole QKV activation and throws most of it away. Here the query weight is sharded by heads and the key/value weight
is replicated and applied to the sequence shard: only keys and values are gathered.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mm.batch import AttentionSpan
from megatron_mm.kernels.rope import mqa_rope
from megatron_mm.model.layer_classes import Backend


@dataclass
class PackedDocuments(PackedSeqParams):
    """What travels through megatron-core's layers to the attention: the spans of the micro-batch."""

    spans: tuple[AttentionSpan, ...] = ()


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


class GroupedQueryAttention(MegatronModule):
    """Self-attention with `num_query_groups` key/value heads, from one (multi-query) to one a query head.

    With at least as many groups as tensor ranks, keys and values are sharded by groups like the queries. With fewer,
    their weight is replicated, applied to the sequence shard, and the result all-gathered over tp: each rank keeps the
    group that its query heads read.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Backend,
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
        self.linear_q = submodules.column_linear(config.hidden_size, query_size, **column)
        # Rows of linear_kv: for each group its key, then its value, so that a shard of rows is a set of whole groups.
        if self.shards_groups:
            self.linear_kv = submodules.column_linear(config.hidden_size, key_value_size, **column)
        else:
            self.linear_kv = submodules.replicated_linear(config.hidden_size, key_value_size, config=config)
        self.query_norm, self.key_norm = (
            submodules.norm(config, self.head_dim, config.layernorm_epsilon) if config.qk_layernorm else None
            for _ in range(2)
        )
        self.core_attention = submodules.core_attention(config, layer_number, self.tp_group)
        self.recompute_core = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        self.linear_proj = submodules.row_linear(
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

        Shapes: hidden_states (num_tokens/cp/tp, 1, hidden); rotary_pos_emb (2, num_tokens/cp, head_dim/2) float32,
        the cosine and sine of each position's angles; returns (num_tokens/cp/tp, 1, hidden).
        """
        assert attention_mask is None and all(value is None for value in inference.values()), "training only"
        query = self.linear_q(hidden_states)[0]
        query = query.view(query.shape[0], -1, self.head_dim)  # (num_tokens/cp, heads/tp, head_dim)
        norms = {} if self.query_norm is None else self._norms()
        query, key, value = mqa_rope(
            query, key_value=self._keys_and_values(hidden_states), cos=rotary_pos_emb[0], sin=rotary_pos_emb[1], **norms
        )
        if self.cp_group.size() > 1:
            key, value = gather_row(torch.stack([key, value], dim=1), group=self.cp_group).unbind(dim=1)

        def core(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.core_attention(query, key, value, spans=packed_seq_params.spans)

        if self.recompute_core and self.training:
            context = tensor_parallel.checkpoint(core, False, query, key, value)
        else:
            context = core(query, key, value)
        return self.linear_proj(context.reshape(context.shape[0], 1, -1))

    def _norms(self) -> dict[str, Tensor | float]:
        return {
            "query_weight": self.query_norm.weight,
            "key_weight": self.key_norm.weight,
            "epsilon": self.config.layernorm_epsilon,
        }

    def _keys_and_values(self, hidden_states: Tensor) -> Tensor:
        """Return the keys and values that this rank's heads read: (num_tokens/cp, groups, 2, head_dim)."""
        key_value = self.linear_kv(hidden_states)[0]
        if not self.shards_groups:
            key_value = tensor_parallel.gather_from_sequence_parallel_region(key_value, True, self.tp_group)
        key_value = key_value.view(key_value.shape[0], -1, 2, self.head_dim)
        if not self.shards_groups and self.groups > 1:
            own = self.tp_group.rank() * self.groups // self.tp_group.size()
            key_value = key_value[:, own : own + 1]
        return key_value
