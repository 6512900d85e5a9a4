"""What a configuration amounts to, counted from the built modules: parameters, layers by stage, tokens a step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.config import Config
from megatron_mm.engine import mesh as meshes
from megatron_mm.engine.mesh import Mesh
from megatron_mm.modalities import BY_NAME, MODALITIES
from megatron_mm.model.decoder import layers_of_chunk, transformer_config
from megatron_mm.model.multimodal import MultimodalModel, build_chunks

COMPONENTS = {
    "decoder": "decoder.",
    "token_embedding": "embedding.word_embeddings.",
    "text_type_embedding": "embedding.text_type_embedding",
    "head": "output_layer.",
    **{f"{name}_tower": f"embedding.{name}.encoder." for name in BY_NAME},
    **{f"{name}_projector": f"embedding.{name}.projector." for name in BY_NAME},
}
"""Which parameters, by the start of their name, make up each component."""


def build_on_meta(config: Config) -> MultimodalModel:
    """Return the whole model of `config` as one chunk without memory, in seconds at any size.

    Raises RuntimeError in a process that is a rank of a run.
    """
    return build_whole(config, meshes.alone(config))


def build_whole(config: Config, alone: Mesh) -> MultimodalModel:
    """Return the whole model of `config` as one chunk without memory; `alone` is the mesh of `meshes.alone`."""
    layout = config.parallel.model_copy(update={"tp": 1, "pp": 1, "vpp": 1, "cp": 1})
    with torch.device("meta"):
        (model,) = build_chunks(config.model_copy(update={"parallel": layout}), alone)
    return model


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return the parameters of each component of a whole model, and their 'total'."""
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        (component,) = [part for part, prefix in COMPONENTS.items() if name.startswith(prefix)]
        counts[component] += parameter.numel()
    return counts | {"total": sum(counts.values())}


def layers_by_stage(config: Config) -> list[list[list[int]]]:
    """Return the layers, counted from 0, of each model chunk of each pipeline stage."""
    transformer = transformer_config(config)
    return [
        [list(layers_of_chunk(transformer, chunk=chunk, pp_rank=stage)) for chunk in range(config.parallel.vpp)]
        for stage in range(config.parallel.pp)
    ]


def encoder_price(config: Config, model: MultimodalModel) -> dict[str, float]:
    """Return what the encoders and projectors add to the first stage, in decoder layers of the same micro-batch.

    For one unit of each modality, and for a micro-batch that is nothing but those. Work is counted in FLOPs of matrix
    products, forward and backward; a frozen tower has no backward pass. Both the towers and the layers are split over
    tp and cp, so the price is the same in every layout. parallel.embedding_slot keeps one layer's room for it;
    parallel.stage_layers any other.
    """
    num_tokens, layer = config.tokens_per_micro_batch, _layer_flops(config, model)
    price = {}
    for modality in MODALITIES:
        part, section = model.embedding.media[modality.name], getattr(config, modality.name)
        tokens = modality.unit_positions(section)
        unit = modality.part("encoder").Encoder.example_unit(section, device="meta")
        tower = _flops(lambda part=part, unit=unit: part.encoder((unit,))) * (3 if part.encoder.trainable else 1)
        features = torch.empty(tokens, part.encoder.width, dtype=_dtype(part.projector), device="meta")
        projector = 3 * _flops(lambda part=part, features=features: part.projector(features))
        price[modality.unit] = (tower + projector) / layer
        price[f"{modality.unit}s_only"] = price[modality.unit] * (num_tokens // tokens)
    return {name: round(value, 4) for name, value in price.items()}


def _layer_flops(config: Config, model: MultimodalModel) -> float:
    """FLOPs of one decoder layer over one micro-batch, forward and backward: 6 a weight and token, and attention's."""
    weights = sum(parameter.numel() for parameter in model.decoder.layers[0].parameters() if parameter.dim() == 2)
    attention = 2 * config.data.seq_len * config.model.num_attention_heads * config.model.head_dim  # causal: half of 4
    return 3.0 * config.tokens_per_micro_batch * (2 * weights + attention)


def _flops(run: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def describe(config: Config, world_size: int) -> dict[str, Any]:
    """Return what `config` amounts to on `world_size` ranks, as plain values."""
    parallel = config.parallel
    model = build_on_meta(config)
    dp_size = world_size // parallel.ranks_per_replica
    return {
        "preset": config.preset,
        "parameters": count_parameters(model),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "layout": {
            "ranks": world_size,
            **{"tp": parallel.tp, "pp": parallel.pp, "vpp": parallel.vpp, "cp": parallel.cp, "dp": dp_size},
        },
        "layers_by_stage": layers_by_stage(config),
        "encoders_in_layers": encoder_price(config, model),
        "micro_batches_per_step": config.num_micro_batches(dp_size),
        "tokens_per_step": config.tokens_per_step,
        "tokens_of_the_run": config.tokens_per_step * config.training.steps,
    }
