"""What the rest of the package asks of a modality: what an item costs in tokens, and where its other parts are.

A modality is a folder of files. `spec` says what it is, and imports no torch: ingestion needs no more. `decode`
turns stored bytes into what the encoder takes, `encoder` is the module that makes features of it, and `hf` knows the
names of both in exports, whose own code is in `exported`. In the folder `towers` is a file for each family of encoders.
Data loading imports the first two, the model spec and encoder, exports all but decode.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import Field

from megatron_mm.settings import PositiveInt, Section

if TYPE_CHECKING:
    from megatron_mm.modalities.family import Family

RANDOM = "random"
"""What a modality's `pretrained` says for an encoder that starts from random weights on purpose."""


class Item(Protocol):
    """A media item on its way into shards: an image, a recording."""

    data: bytes


class Geometry(Section):
    """The settings that decide how many tokens an item becomes: shards and the model must agree on them."""


class EncoderSection(Section):
    """The settings that the encoder of every modality has."""

    encoder: str
    """Family of the encoder: a file of the modality's folder `towers`."""
    hidden_size: PositiveInt
    """Width of the encoder."""
    pretrained: str | None = Field(None, min_length=1)
    """File that a new run's encoder starts from, or `random` for random weights, to be trained. null takes the encoder
    of training.start_from; without that, a run does not start."""
    trainable: bool = True
    """Fine-tune the encoder with the decoder; false keeps it as pretrained. The projector is always trained."""

    def failures(self, name: str) -> Iterator[str]:
        """Yield what is wrong with the settings, which the user knows as `name`.*, and how to mend it."""
        known = encoders_beside(type(self).__module__)
        if self.encoder not in known:
            close = get_close_matches(self.encoder, known, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Use one of {', '.join(known)}."
            yield f"{name}.encoder={self.encoder} is no encoder that there is. {hint}"
        if self.pretrained == RANDOM and not self.trainable:
            yield (
                f"{name}.pretrained=random and {name}.trainable=false are an encoder of random weights that never "
                f"learns. Give {name}.pretrained the file of a pretrained one, or set {name}.trainable=true."
            )


class Modality(ABC):
    """A kind of media. Its section of a configuration inherits from its `geometry` and from `EncoderSection`."""

    name: ClassVar[str]
    """Names the section of settings, the special tokens, and what is counted."""
    kind: ClassVar[int]
    """Number in the media index of shards: part of the format on disk."""
    geometry: ClassVar[type[Geometry]]
    section: ClassVar[type[EncoderSection]]
    unit: ClassVar[str]
    """What one unit is, in the words of reports: an image, a second."""

    @property
    def special_tokens(self) -> tuple[str, str, str]:
        """The roles of its special tokens: before an item, the placeholder that a feature replaces, behind an item."""
        return f"{self.name}_start", self.name, f"{self.name}_end"

    @abstractmethod
    def num_tokens(self, item: Any, geometry: Any) -> int:
        """Return the placeholders that an item of ingestion fills: as many as the encoder makes features of it."""

    @abstractmethod
    def unit_lengths(self, num_tokens: int, geometry: Any) -> list[int]:
        """Return the tokens of each unit, encoded on its own, of an item of `num_tokens`; empty if none has so many."""

    @abstractmethod
    def unit_tokens(self, geometry: Any) -> int:
        """Return the tokens of a whole unit."""

    def unit_positions(self, geometry: Any) -> int:
        """Return the positions of a sample that a whole unit takes, with its start and end token if it has its own."""
        return self.unit_tokens(geometry)

    def cut(self, item: Any, *, max_seconds: int) -> list[Any]:
        """Return an item as those that are stored: itself, unless it is a recording of more than `max_seconds`."""
        return [item]

    def fingerprint(self, geometry: Geometry) -> dict[str, Any]:
        """Return what shards record of the geometry that they were made for."""
        return {name: getattr(geometry, name) for name in self.geometry.model_fields}

    def part(self, name: str) -> ModuleType:
        """Return the file `name` of the modality's folder: 'decode', 'encoder' or 'hf'."""
        return import_module(f"{type(self).__module__.rpartition('.')[0]}.{name}")

    def encoders(self) -> list[str]:
        """Return the families of encoders that there are: what the setting `encoder` may say."""
        return encoders_beside(type(self).__module__)

    def family(self, section: EncoderSection) -> "Family":
        """Return the family of encoders that a section of settings names."""
        return self.family_of(section.encoder)

    def family_of(self, encoder: str) -> "Family":
        """Return the family of encoders in the file `encoder` of the modality's folder `towers`."""
        return self.part(f"towers.{encoder}").FAMILY


def encoders_beside(module: str) -> list[str]:
    """Return the families in the folder `towers` beside the file of `module`, without importing them."""
    towers = Path(import_module(module).__file__).parent / "towers"
    return sorted(path.stem for path in towers.glob("*.py") if path.stem != "__init__")
