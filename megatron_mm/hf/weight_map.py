"""Which rows of which of our tensors make up each Hugging Face tensor. One map: imports run it backwards."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_mm.config import ModelConfig
from megatron_mm.errors import DataError
from megatron_mm.modalities import EncoderSection
from megatron_mm.modalities.exports import Exports
from megatron_mm.modalities.family import Family

TEXT_TYPE = "embedding.text_type_embedding"
CONSTANTS = ("rotary_emb.inv_freq",)
"""Endings of what old folders keep beside weights."""


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


@dataclass(frozen=True)
class MediaMap:
    """The tensors of one modality's encoder and projector, here and in an export."""

    exports: Exports
    family: Family
    section: EncoderSection

    @property
    def ours(self) -> str:
        """What the names of our tensors begin with."""
        return f"embedding.{self.exports.modality.name}."

    @property
    def tower(self) -> tuple[str, str]:
        """What the names of the encoder's tensors begin with, ours and theirs."""
        return f"{self.ours}encoder.tower.", f"model.{self.exports.tower}."

    @property
    def projector(self) -> tuple[str, str]:
        """What the names of the projector's tensors begin with, ours and theirs."""
        return f"{self.ours}projector.", f"model.{self.exports.projector}."

    @property
    def kept(self) -> tuple[str, ...]:
        """Our tensors that no export has: a published final norm that the projector's norm stands in for."""
        return tuple(f"{self.tower[0]}{self.family.norm}.{part}" for part in ("weight", "bias") if self.family.norm)

    def exported(self, name: str) -> str:
        """Return the name in an export of one of our tensors."""
        (ours, theirs), (own, other) = self.tower, self.projector
        if name.startswith(ours):
            return theirs + self.family.exported(name.removeprefix(ours))
        return other + re.sub(r"^norm\.", "layer_norm.", name.removeprefix(own))

    def imported(self, name: str) -> str | None:
        """Return our name of a tensor of an export, None if it is not of this modality."""
        (ours, theirs), (own, other) = self.tower, self.projector
        if name.startswith(theirs):
            return ours + self.family.imported(name.removeprefix(theirs))
        return own + re.sub(r"^layer_norm\.", "norm.", name.removeprefix(other)) if name.startswith(other) else None

    def neutral(self) -> Iterator[str]:
        """Yield the names in an export of the vectors of ones that our encoder has not."""
        return (self.exported(self.tower[0] + name) for name in self.family.neutral(self.section))

    def targets(self, rows: dict[str, int]) -> Iterator[Target]:
        """Yield the tensors of an export; `rows` are those of each tensor that we hold.

        The modality-type embedding goes into the last bias, where training adds it too: exact to the bit in any
        precision. Tensors come in the order of their names, layer 2 before layer 10: that of `rows` depends on who
        saved them.
        """
        bias, type_embedding = (f"{self.projector[0]}linear_2.{part}" for part in ("bias", "type_embedding"))
        for name in sorted(rows, key=_by_number):
            if name.startswith(self.ours) and name not in (*self.kept, type_embedding):
                yield whole(self.exported(name), name, rows[name], plus=type_embedding if name == bias else None)
        for name in self.neutral():
            yield Target(name, (), fill_like=self.tower[0] + self.family.like, fill=1.0)

    def sources(self, rows: dict[str, int]) -> Iterator[Target]:
        """Yield our tensors; `rows` are those of each tensor of an export."""
        neutral = set(self.neutral())
        for name in rows:
            if (ours := self.imported(name)) and name not in neutral:
                yield whole(ours, name, rows[name])
                if ours == f"{self.projector[0]}linear_2.bias":  # the type embedding is in it already
                    yield Target(ours.replace("bias", "type_embedding"), (), fill_like=name)
        like = self.exported(self.tower[0] + self.family.like)
        for name in self.kept:
            yield Target(name, (), fill_like=like, fill=float(name.endswith("weight")))


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
