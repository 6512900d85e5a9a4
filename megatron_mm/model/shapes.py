"""Names and shapes of the whole model's tensors, from its settings alone: no weights, no process group, no layout.

What is loaded, imported or exported is compared with them before a byte of it is used.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from megatron_mm.config import Config, ModelConfig
from megatron_mm.modalities import BY_NAME, MODALITIES

Shape = tuple[int, ...]
SETTINGS = {
    **{f"embedding.{name}.": f"{name}.* and model.hidden_size" for name in BY_NAME},
    "": "model.num_layers, hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, head_dim, vocab_size "
    "and qk_norm",
}
"""Which settings decide the tensors whose names start so; the first that fits."""
FEW = 4
"""Tensors of a layer that are listed one by one; more of them are counted."""


def tensor_shapes(config: Config) -> dict[str, Shape]:
    """Return the shape of every tensor of the model by its name in the whole model."""
    shapes = dict(_decoder_shapes(config.model))
    with torch.device("meta"):
        encoders = {own.name: own.part("encoder").Encoder(getattr(config, own.name)) for own in MODALITIES}
    for name, encoder in encoders.items():
        prefix = f"embedding.{name}."
        shapes |= {f"{prefix}encoder.{key}": shape for key, shape in _shapes_of(encoder)}
        projector = _projector_shapes(encoder.width, config.model.hidden_size)
        shapes |= {f"{prefix}projector.{key}": shape for key, shape in projector.items()}
    return shapes


def _shapes_of(module: nn.Module) -> Iterator[tuple[str, Shape]]:
    return ((name, tuple(value.shape)) for name, value in module.state_dict().items())


def _decoder_shapes(model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden, ffn, dim = model.hidden_size, model.ffn_hidden_size, model.head_dim
    queries = model.num_attention_heads * dim
    yield "embedding.word_embeddings.weight", (model.vocab_size, hidden)
    yield "embedding.text_type_embedding", (hidden,)
    for number in range(model.num_layers):
        layer = f"decoder.layers.{number}."
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}self_attention.linear_q.weight", (queries, hidden)
        yield f"{layer}self_attention.linear_kv.weight", (2 * model.num_query_groups * dim, hidden)
        if model.qk_norm:
            yield f"{layer}self_attention.query_norm.weight", (dim,)
            yield f"{layer}self_attention.key_norm.weight", (dim,)
        yield f"{layer}self_attention.linear_proj.weight", (hidden, queries)
        yield f"{layer}pre_mlp_layernorm.weight", (hidden,)
        yield f"{layer}mlp.linear_fc1.weight", (2 * ffn, hidden)
        yield f"{layer}mlp.linear_fc2.weight", (hidden, ffn)
    yield "decoder.final_layernorm.weight", (hidden,)
    yield "output_layer.weight", (model.vocab_size, hidden)


def _projector_shapes(width: int, hidden: int) -> dict[str, Shape]:
    return {
        **{"norm.weight": (width,), "norm.bias": (width,)},
        **{"linear_1.weight": (hidden, width), "linear_1.bias": (hidden,)},
        **{"linear_2.weight": (hidden, hidden), "linear_2.bias": (hidden,), "linear_2.type_embedding": (hidden,)},
    }


def compare_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """Return how tensors that were found differ from those that are expected, equal layers together; empty if not."""
    lists = {
        "it lacks": expected.keys() - found.keys(),
        "it has, and the model has not": found.keys() - expected.keys(),
    }
    lines = [f"{what} {', '.join(_by_layer(names))}{_hint(names)}" for what, names in lists.items() if names]
    shapes: dict[tuple[Shape, Shape], list[str]] = defaultdict(list)
    for name in found.keys() & expected.keys():
        if tuple(found[name]) != tuple(expected[name]):
            shapes[tuple(found[name]), tuple(expected[name])].append(name)
    for (there, here), names in sorted(shapes.items()):
        lines.append(f"{there} in it, {here} in the model: {', '.join(_by_layer(names))}{_hint(names)}")
    return lines


def _hint(names: Iterable[str]) -> str:
    prefixes = {next(prefix for prefix in SETTINGS if name.startswith(prefix)) for name in names}
    return f" (see {'; '.join(SETTINGS[prefix] for prefix in SETTINGS if prefix in prefixes)})"


def _by_layer(names: Iterable[str]) -> list[str]:
    """Return `names` with equal ones of several layers in one: stack.layers.2-5.norm.weight."""
    layers: dict[tuple[str, str], list[int]] = defaultdict(list)
    listed = []
    for name in sorted(names):
        if found := re.fullmatch(r"(.*layers)\.(\d+)\.(.*)", name):
            layers[found[1], found[3]].append(int(found[2]))
        else:
            listed.append(name)
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (stack, rest), numbers in layers.items():
        alike[stack, _ranges(sorted(numbers))].append(rest)
    for (stack, numbers), rests in alike.items():
        if len(rests) > FEW:
            listed.append(f"{stack}.{numbers}.* ({len(rests)} tensors a layer)")
        else:
            listed += [f"{stack}.{numbers}.{rest}" for rest in rests]
    return listed


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as '2-5,7'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
