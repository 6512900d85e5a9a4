"""Decoder layers of TransformerEngine: fused norms, FP8, attention, overlapped tensor-parallel communication.

The only module that imports TransformerEngine. Its parameters have the names and shapes of the local backend's.
"""

from typing import Any

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TELinear, TENorm, TERowParallelLinear
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mm.batch import AttentionSpan
from megatron_mm.config import Config
from megatron_mm.engine import device
from megatron_mm.model.core_attention import varlen_operands
from megatron_mm.model.layer import Backend

BOOTSTRAP = "nccl"
"""The backend that user buffers of a node meet over; TransformerEngine can also take mpi and gloo."""


class DocumentAttention(nn.Module):
    """Causal attention inside each packed document, by TransformerEngine's choice of cuDNN or flash-attn kernel.

    Context parallelism is ours, not TransformerEngine's: keys and values of the row are gathered before, which with one
    key/value head moves less than its ring, and needs no padding of each document to a multiple of 2 cp tokens.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.kernel = te.DotProductAttention(
            config.num_attention_heads,
            config.kv_channels,
            # Divided by tp there: with fewer groups than ranks each rank holds the one that its heads read.
            num_gqa_groups=max(config.num_query_groups, tp_group.size()),
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal",
            sequence_parallel=config.sequence_parallel,
            tp_size=tp_group.size(),
            tp_group=tp_group,
            layer_number=layer_number,
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, spans: tuple[AttentionSpan, ...]) -> Tensor:
        """Return the context of each position; see `model.core_attention` for the shapes. No communication."""
        contexts = []
        for own, keys, values, cu_q, cu_kv, max_q, max_kv in varlen_operands(query, key, value, spans=spans):
            whole = own.shape[0] == keys.shape[0]
            context = self.kernel(
                own,
                keys.contiguous(),
                values.contiguous(),
                cu_seqlens_q=cu_q,
                cu_seqlens_kv=cu_kv,
                max_seqlen_q=max_q,
                max_seqlen_kv=max_kv,
                attn_mask_type="padding_causal" if whole else "padding_causal_bottom_right",
            )
            contexts.append(context.view_as(own))
        return torch.cat(contexts)


def replicated_linear(input_size: int, output_size: int, *, config: TransformerConfig) -> TELinear:
    """Return TransformerEngine's form of `layer.ReplicatedLinear`: the same attributes on its weight."""
    return TELinear(
        input_size,
        output_size,
        parallel_mode="duplicated",
        config=config,
        init_method=config.init_method,
        bias=False,
        skip_bias_add=False,
        skip_weight_param_allocation=False,
    )


def backend() -> Backend:
    """Return the backend of TransformerEngine's layers."""
    return Backend(
        name="transformer_engine",
        attention="transformer_engine",
        column_linear=TEColumnParallelLinear,
        row_linear=TERowParallelLinear,
        replicated_linear=replicated_linear,
        norm=TENorm,
        residual_add=get_bias_dropout_add,
        start=start_user_buffers,
        core_attention=DocumentAttention,
    )


def user_buffers(config: Config) -> dict[str, Any]:
    """Return the arguments of TransformerEngine's `initialize_ub` for `config`.

    One set of buffers for FP8 layers, and one for those that stay BF16.
    """
    mode = te.module.base.UserBufferQuantizationMode
    modes = [mode.FP8] if config.training.precision == "fp8" else [mode.NONE]
    if config.training.precision == "fp8" and config.training.bf16_end_layers:
        modes.append(mode.NONE)
    return {
        "shape": [config.tokens_per_micro_batch // config.parallel.cp, config.model.hidden_size],
        "tp_size": config.parallel.tp,
        "quantization_modes": modes,
        "bootstrap_backend": BOOTSTRAP,
    }


def start_user_buffers(config: Config) -> None:
    """With parallel.tp_comm_overlap, allocate the buffers through which communication overlaps with matrix products.

    Collective over tp; on the meta device nothing is allocated.
    """
    if config.parallel.tp_comm_overlap and device.current().type == "cuda":
        te.module.base.initialize_ub(**user_buffers(config))
