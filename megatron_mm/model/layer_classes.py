"""What a backend says of a decoder layer: the classes that it is built of, whichever library they come from."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mm.config import Config


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
    """(input_size, output_size, *, config): see `backend.ReplicatedLinear`."""
    norm: Callable[..., nn.Module]
    """(config, hidden_size, eps): see `backend.RMSNorm`."""
    residual_add: Callable[[bool, bool], Callable[..., Tensor | PendingSum]]
    """What adds the output of attention to the residual before the second norm; see `backend.defer_add`."""
    start: Callable[[Config], None]
    """Makes ready what its layers need, once, before they are built. Collective over tp."""
    core_attention: Callable[[TransformerConfig, int, dist.ProcessGroup], nn.Module]
    """(config, layer_number, tp_group) to a module with the interface of `core_attention`."""
