"""What turns stored bytes into the units that an encoder takes: the interface of every modality's `decode`."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

log = logging.getLogger(__name__)


class Shown(NamedTuple):
    """A picture of one unit, for people: (height, width, 3) uint8, and what it says below."""

    pixels: np.ndarray
    caption: str


class Dali(Protocol):
    """Decodes items by DALI; gives None for one that it refuses."""

    name: str

    def __call__(self, encoded: Sequence[bytes]) -> list[Tensor | None]:
        """Return each item as a tensor."""


class Decoder(ABC):
    """Decodes the items of one modality in batches; one that nothing can decode costs the others nothing.

    A subclass says how the reference does it. With `dali`, items go there first, and what it refuses to the reference.
    """

    library = "the reference"
    """What the reference is, for the line that says what decodes."""
    items = "items"
    """What it decodes, in the words of a message."""
    mime = ""
    """The MIME type of items, if a browser can play them."""

    def __init__(self, section: Any, *, dali: "Dali | None" = None) -> None:
        self.section, self._dali = section, dali
        self.name = self.library if dali is None else dali.name

    def decode(self, encoded: Sequence[bytes]) -> list[list[Tensor] | None]:
        """Return the units of each item, in order; None of an item that cannot be decoded."""
        if self._dali is None:
            return [self.units(data) for data in encoded]
        decoded = self._dali(encoded)
        refused = sum(item is None for item in decoded)
        if refused:
            log.warning("DALI refuses %d of %d %s: %s decodes them", refused, len(decoded), self.items, self.library)
        return [
            self.units(data) if item is None else self.cut(item) for data, item in zip(encoded, decoded, strict=True)
        ]

    def units(self, data: bytes) -> list[Tensor] | None:
        """Return the units of one item as the reference decodes them; None if it cannot."""
        item = self.reference(data)
        return None if item is None else self.cut(item)

    @abstractmethod
    def reference(self, data: bytes) -> Tensor | None:
        """Return one item as a tensor; None if it cannot be decoded."""

    @abstractmethod
    def cut(self, item: Tensor) -> list[Tensor]:
        """Return an item as the units that are encoded on their own."""

    @abstractmethod
    def blank(self, num_tokens: int) -> list[Tensor]:
        """Return the units of an item of `num_tokens` that holds nothing, in the place of one that is damaged."""

    @abstractmethod
    def num_tokens(self, units: Sequence[Tensor]) -> int:
        """Return the tokens that the encoder makes of `units`."""

    @abstractmethod
    def show(self, unit: Tensor) -> Shown:
        """Return a picture of a unit as the encoder gets it."""
