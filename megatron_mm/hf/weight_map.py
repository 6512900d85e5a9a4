"""Which rows of which of our tensors make up each Hugging Face tensor. One map: imports run it backwards."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_mm.config import ModelConfig
from megatron_mm.errors import DataError

TEXT_TYPE = "embedding.text_type_embedding"
NEUTRAL = ("lambda_1", "lambda_2")
"""InternVL's LayerScale, which our image encoder has not: one in an export."""
IGNORED = (*NEUTRAL, "rotary_emb.inv_freq")
"""Of a folder that is imported: what is neutral, and a constant that old files keep."""
KEPT = "embedding.image.encoder.tower.layernorm."
"""The published final norm of the image encoder: not applied (the projector's norm stands in its place)."""
RENAMED = (
    ("embedding.image.encoder.tower.layers.", "model.vision_tower.encoder.layer."),
    ("embedding.image.encoder.tower.", "model.vision_tower."),
    ("embedding.image.projector.norm.", "model.multi_modal_projector.layer_norm."),
    ("embedding.image.projector.", "model.multi_modal_projector."),
    ("embedding.audio.encoder.tower.", "model.audio_tower."),
    ("embedding.audio.projector.norm.", "model.audio_projector.layer_norm."),
    ("embedding.audio.projector.", "model.audio_projector."),
)
"""Prefixes of the encoders and projectors, ours and theirs: the first that fits."""
ATTENTION_OUTPUT = (".attention.o_proj.", ".attention.projection_layer.")
"""The same in names of the image encoder."""


@dataclass(frozen=True)
class Rows:
    """Rows start to stop of a tensor."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class Target:
    """A tensor as rows of others, end to end."""

    name: str
    rows: tuple[Rows, ...]
    """Empty: the tensor is a constant vector, `fill` everywhere."""
    plus: str | None = None
    """A vector that is added: to each row of a matrix, or element by element to a vector."""
    fill_like: str | None = None
    """A tensor whose last dimension a constant vector has."""
    fill: float = 0.0


def whole(name: str, source: str, rows: int, *, plus: str | None = None) -> Target:
    """Return a target that is all of one tensor."""
    return Target(name, (Rows(source, 0, rows),), plus)


def decoder(model: ModelConfig, *, prefix: str, kv_replicate: int = 1) -> Iterator[Target]:
    """Yield the tensors of transformers' Llama (Qwen3 with model.qk_norm): embedding, layers, norm and head.

    Query rows are theirs as they are: both rotate halves. Our key/value weight holds, for each group, its key and then
    its value; gate and up are one tensor. With `kv_replicate` each key/value head is written that many times, which
    changes nothing but lets servers shard it over as many ranks.
    """
    hidden, ffn, dim = model.hidden_size, model.ffn_hidden_size, model.head_dim
    queries = model.num_attention_heads * dim
    groups = [group for group in range(model.num_query_groups) for _ in range(kv_replicate)]
    yield whole(f"{prefix}embed_tokens.weight", "embedding.word_embeddings.weight", model.vocab_size, plus=TEXT_TYPE)
    for number in range(model.num_layers):
        ours, theirs = f"decoder.layers.{number}.", f"{prefix}layers.{number}."
        attention, key_value = ours + "self_attention.", ours + "self_attention.linear_kv.weight"
        keys = tuple(Rows(key_value, 2 * group * dim, (2 * group + 1) * dim) for group in groups)
        values = tuple(Rows(key_value, (2 * group + 1) * dim, (2 * group + 2) * dim) for group in groups)
        gate_and_up = ours + "mlp.linear_fc1.weight"
        yield whole(theirs + "input_layernorm.weight", ours + "input_layernorm.weight", hidden)
        yield whole(theirs + "self_attn.q_proj.weight", attention + "linear_q.weight", queries)
        yield Target(theirs + "self_attn.k_proj.weight", keys)
        yield Target(theirs + "self_attn.v_proj.weight", values)
        if model.qk_norm:
            yield whole(theirs + "self_attn.q_norm.weight", attention + "query_norm.weight", dim)
            yield whole(theirs + "self_attn.k_norm.weight", attention + "key_norm.weight", dim)
        yield whole(theirs + "self_attn.o_proj.weight", attention + "linear_proj.weight", hidden)
        yield whole(theirs + "post_attention_layernorm.weight", ours + "pre_mlp_layernorm.weight", hidden)
        yield Target(theirs + "mlp.gate_proj.weight", (Rows(gate_and_up, 0, ffn),))
        yield Target(theirs + "mlp.up_proj.weight", (Rows(gate_and_up, ffn, 2 * ffn),))
        yield whole(theirs + "mlp.down_proj.weight", ours + "mlp.linear_fc2.weight", hidden)
    yield whole(f"{prefix}norm.weight", "decoder.final_layernorm.weight", hidden)
    yield whole("lm_head.weight", "output_layer.weight", model.vocab_size)


def renamed(name: str, *, ours: bool) -> str | None:
    """Return the other side's name of an encoder's or projector's tensor, None if it is neither's."""
    here, there = (0, 1) if ours else (1, 0)
    for pair in RENAMED:
        if name.startswith(pair[here]):
            other = pair[there] + name.removeprefix(pair[here])
            is_vision = pair[0].startswith("embedding.image.encoder.")
            return other.replace(ATTENTION_OUTPUT[here], ATTENTION_OUTPUT[there]) if is_vision else other
    return None


def encoder(rows: dict[str, int], *, modality: str, num_layers: int) -> Iterator[Target]:
    """Yield the exported tensors of one modality's encoder and projector; `rows` are those of each tensor we hold.

    The modality-type embedding goes into the last bias, where training adds it too: exact to the bit in any precision.
    Tensors come in the order of their names, layer 2 before layer 10: that of `rows` depends on who saved them.
    """
    prefix = f"embedding.{modality}."
    for name in sorted(rows, key=_by_number):
        if not name.startswith(prefix) or name.startswith(KEPT) or name.endswith("type_embedding"):
            continue
        is_typed = name == f"{prefix}projector.linear_2.bias"
        type_embedding = f"{prefix}projector.linear_2.type_embedding" if is_typed else None
        yield whole(renamed(name, ours=True), name, rows[name], plus=type_embedding)
    if modality == "image":
        for number in range(num_layers):
            like = f"{prefix}encoder.tower.layers.{number}.layernorm_before.weight"
            layer = f"model.vision_tower.encoder.layer.{number}."
            for part in NEUTRAL:
                yield Target(layer + part, (), fill_like=like, fill=1.0)


def _by_number(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def inverted(targets: Sequence[Target]) -> list[Target]:
    """Return the same map the other way: each of our tensors as rows of Hugging Face's.

    What was added to a tensor stays in it, and is itself zero on the way back. Raises DataError if the map does not say
    every row of one of our tensors exactly once.
    """
    pieces: dict[str, list[tuple[int, Rows]]] = defaultdict(list)
    for target in targets:
        first = 0
        for rows in target.rows:
            size = rows.stop - rows.start
            pieces[rows.source].append((rows.start, Rows(target.name, first, first + size)))
            first += size
    result = []
    for name, found in pieces.items():
        found.sort(key=lambda piece: piece[0])
        stop = 0
        for start, rows in found:
            if start != stop:
                raise DataError(f"{name}: row {min(start, stop)} is not written exactly once.")
            stop = start + rows.stop - rows.start
        result.append(Target(name, tuple(rows for _, rows in found)))
    zeros = [(target.plus, target.name) for target in targets if target.plus]
    return result + [Target(name, (), fill_like=like) for name, like in zeros]
