"""The decoder: megatron-core's TransformerBlock with our attention and a norm that knows sequence parallelism."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    get_transformer_layer_offset,
)

from megatron_mm.config import Config, TrainingConfig
from megatron_mm.engine import device
from megatron_mm.model.layer import Backend, layer_spec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""The type of weights, and of activations outside matrix products, in each training.precision."""
FP8_RECIPES = {"current": "tensorwise", "delayed": "delayed", "blockwise": "blockwise"}
"""megatron-core's names for training.fp8_recipe."""


def transformer_config(config: Config, *, accumulates_in_place: bool = False) -> TransformerConfig:
    """Translate `config` into megatron-core's terms.

    With `accumulates_in_place` linear layers add weight gradients to the FP32 buffer of data parallelism themselves,
    and run backward only where there is one.
    """
    model, parallel, training = config.model, config.parallel, config.training
    dtype = DTYPES[training.precision]
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[training.recompute]
    interleaved = parallel.vpp > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # its name for: take the activation from the MLP's submodules
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=accumulates_in_place,
        # Weights are drawn by model.initialize, the same for every layout.
        perform_initialization=False,
        use_cpu_initialization=device.current().type == "cpu",
        init_model_with_meta_device=device.current().type == "meta",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=training.precision != "fp32",
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if interleaved else None,
        sequence_parallel=parallel.tp > 1,
        context_parallel_size=parallel.cp,
        # The two stages of pp=2 are both neighbours of each other: megatron-core 0.19.2 then mismatches batched sends
        # of an interleaved schedule without a word.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=True,
        pipeline_model_parallel_layout=_explicit_layout(parallel.stage_layers),
        account_for_embedding_in_pipeline_split=parallel.embedding_slot,
        account_for_loss_in_pipeline_split=parallel.loss_slot,
        calculate_per_token_loss=True,
        tp_comm_overlap=parallel.tp_comm_overlap,
        **recompute,
        **(_fp8(training) if training.precision == "fp8" else {}),
    )


def _fp8(training: TrainingConfig) -> dict[str, Any]:
    """Return what FP8 training is in megatron-core's terms: E4M3 forward, E5M2 gradients, the end layers in BF16."""
    return {
        "fp8": "hybrid",
        "fp8_recipe": FP8_RECIPES[training.fp8_recipe],
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": training.bf16_end_layers > 0,
        "num_layers_at_start_in_bf16": training.bf16_end_layers,
        "num_layers_at_end_in_bf16": training.bf16_end_layers,
    }


def block_submodules(
    config: TransformerConfig, *, backend: Backend, chunk: int, pp_rank: int
) -> TransformerBlockSubmodules:
    """Return what the transformer block of model chunk `chunk` of stage `pp_rank` is built of."""
    num_layers = len(layers_of_chunk(config, chunk=chunk, pp_rank=pp_rank))
    return TransformerBlockSubmodules(layer_specs=[layer_spec(backend)] * num_layers, layer_norm=backend.norm)


def _explicit_layout(stage_layers: tuple[int, ...] | None) -> list[list[str]] | None:
    """Return `stage_layers` as megatron-core lists what each chunk holds."""
    if stage_layers is None:
        return None
    chunks = [["decoder"] * count for count in stage_layers]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def layers_of_chunk(config: TransformerConfig, *, chunk: int, pp_rank: int) -> range:
    """Return the layers, counted from 0, that model chunk `chunk` of stage `pp_rank` holds."""
    explicit = config.pipeline_model_parallel_layout
    if explicit is not None:  # megatron-core 0.19.2 looks this rank's own stage up, whatever stage is asked for
        counts = [
            explicit.layout[stage][part].count(LayerType.decoder)
            for part in range(chunk + 1)
            for stage in range(config.pipeline_model_parallel_size)
        ]
        own = chunk * config.pipeline_model_parallel_size + pp_rank
        return range(sum(counts[:own]), sum(counts[: own + 1]))
    vp_stage = chunk if config.virtual_pipeline_model_parallel_size else None
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    return range(first, first + get_num_layers_to_build(config, vp_stage, pp_rank))
