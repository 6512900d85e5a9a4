"""One decoder layer, whole: what it is made of, in the order in which a position goes through it.

    sum = hidden + attention(norm(hidden));  hidden = sum + linear_fc2(swiglu(linear_fc1(norm(sum))))

`layer_spec` puts it together for megatron-core's TransformerLayer. Linear layers, norms and the core of attention come
from a `Backend`: megatron-core's and ours (`backend.local`), or TransformerEngine's, which name and shape their
parameters alike.

megatron-core 0.19.2, when there are fewer key/value heads than tensor ranks, shards the fused QKV weight, all-gathers
the whole QKV activation and throws most of it away. Here the query weight is sharded by heads and the key/value weight
is replicated and applied to the sequence shard: only keys and values are gathered.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_mm.batch import AttentionSpan
from megatron_mm.config import Config
from megatron_mm.kernels.rms_norm import add_rms_norm, rms_norm
from megatron_mm.kernels.rope import mqa_rope
from megatron_mm.kernels.swiglu import swiglu


@dataclass(frozen=True)
class PendingSum:
    """A sum that the norm after it computes as it reads it: each term (num_tokens/cp/tp, 1, hidden)."""

    output: Tensor
    residual: Tensor


@dataclass(frozen=True)
class Backend:
    """The classes of a decoder layer."""

    name: str
    attention: str
    """Which form of attention runs."""
    column_linear: Callable[..., nn.Module]
    """megatron-core's ColumnParallelLinear, or what has its interface."""
    row_linear: Callable[..., nn.Module]
    """megatron-core's RowParallelLinear, or what has its interface."""
    replicated_linear: Callable[..., nn.Module]
    """(input_size, output_size, *, config): see `ReplicatedLinear`."""
    norm: Callable[..., nn.Module]
    """(config, hidden_size, eps): see `RMSNorm`."""
    residual_add: Callable[[bool, bool], Callable[..., Tensor | PendingSum]]
    """What adds the output of attention to the residual before the second norm; see `defer_add`."""
    start: Callable[[Config], None]
    """Makes ready what its layers need, once, before they are built. Collective over tp."""
    core_attention: Callable[[TransformerConfig, int, dist.ProcessGroup], nn.Module]
    """(config, layer_number, tp_group) to a module with the interface of `core_attention`."""


def layer_spec(backend: Backend) -> ModuleSpec:
    """Return a layer of `backend`'s classes as megatron-core's block builds it."""
    feed_forward = MLPSubmodules(
        linear_fc1=backend.column_linear, linear_fc2=backend.row_linear, activation_func=SwiGLU
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=ModuleSpec(module=GroupedQueryAttention, submodules=backend),
            self_attn_bda=backend.residual_add,
            pre_mlp_layernorm=backend.norm,
            mlp=partial(MLP.as_mlp_submodule, submodules=feed_forward),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019) over a sequence shard.

    megatron-core's own wrapper refuses sequence parallelism without TransformerEngine.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        place = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=place))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, hidden: Tensor | PendingSum) -> Tensor | tuple[Tensor, Tensor]:
        """Return hidden / rms(hidden) * weight, over the last dimension; of a pending sum, its norm and the sum."""
        if isinstance(hidden, PendingSum):
            operands = {"residual": hidden.residual, "weight": self.weight, "epsilon": self.eps}
            return add_rms_norm(hidden.output, **operands)
        return rms_norm(hidden, weight=self.weight, epsilon=self.eps)


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


class ReplicatedLinear(nn.Module):
    """A linear layer whose weight every tensor rank holds whole and applies to its own sequence shard.

    Its gradient is partial over the sequence, so the weight is marked `sequence_parallel`: finalize_model_grads sums
    it over the tensor ranks once a step.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig) -> None:
        super().__init__()
        place = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=place))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """Return (hidden @ weight.T, no bias), as megatron-core's linear layers do. No communication."""
        return F.linear(hidden, self.weight), None


def defer_add(training: bool, fused: bool) -> Callable[..., PendingSum]:
    """Stand where megatron-core's layer asks for its bias-dropout-add, and leave the sum to `RMSNorm`.

    There are no biases and no dropout; the layer takes (norm, residual) of a norm that returns both.
    """

    def add(output_with_bias: tuple[Tensor, None], residual: Tensor, dropout: float) -> PendingSum:
        assert output_with_bias[1] is None and dropout == 0.0
        return PendingSum(output_with_bias[0], residual)

    return add


class SwiGLU(nn.Module):
    """The activation of the feed-forward network, gate and up in one tensor."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """Return silu(gate) * up: (..., 2 ffn_hidden/tp) to (..., ffn_hidden/tp)."""
        return swiglu(gate_and_up)
