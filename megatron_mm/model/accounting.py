"""What a configuration amounts to, counted from the built modules: parameters, layers by stage, tokens a step."""

from typing import Any

import torch
from torch import nn

from megatron_mm.config import Config
from megatron_mm.model.decoder import layers_of_chunk, transformer_config
from megatron_mm.model.multimodal import MultimodalModel, build_chunks
from megatron_mm.parallel import mesh as meshes

COMPONENTS = {
    "decoder": "decoder.",
    "token_embedding": "embedding.word_embeddings.",
    "text_type_embedding": "embedding.text_type_embedding",
    "head": "output_layer.",
    "vision_tower": "embedding.image.encoder.",
    "vision_projector": "embedding.image.projector.",
    "audio_tower": "embedding.audio.encoder.",
    "audio_projector": "embedding.audio.projector.",
}
"""Which parameters, by the start of their name, make up each component."""


def build_on_meta(config: Config) -> MultimodalModel:
    """Return the whole model of `config` as one chunk without memory, in seconds at any size.

    Raises RuntimeError in a process that is a rank of a run.
    """
    mesh = meshes.alone(config)
    layout = config.parallel.model_copy(update={"tp": 1, "pp": 1, "vpp": 1, "cp": 1})
    with torch.device("meta"):
        (model,) = build_chunks(config.model_copy(update={"parallel": layout}), mesh)
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
        "micro_batches_per_step": config.num_micro_batches(dp_size),
        "tokens_per_step": config.tokens_per_step,
        "tokens_of_the_run": config.tokens_per_step * config.training.steps,
    }
