"""A family of encoders: the one file that a modality's folder `towers` holds for each."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

Names = Sequence[tuple[str, str | Callable[[Any], str]]]
"""Patterns and what replaces them, one after the other, as `re.sub` takes them."""


class Family(ABC):
    """How encoders of one kind are built, what they compute, and what files and exports call their tensors.

    Nothing is imported from transformers before `build`: exports read names and settings in a process without it.
    """

    names: Names = ()
    """What turns the names in pretrained files, of each library, into those of the module."""
    left_behind: str = ""
    """What an encoder leaves behind of a pretrained file: classification heads, pretraining objectives."""
    meaning: Sequence[str] = ()
    """Settings in the config.json of a Hugging Face folder that change what its weights mean, and mostly no shape."""
    sizes: str
    """The settings that decide the shapes of the tensors, in the words of a message."""
    norm: str | None = None
    """The module's published final norm if it is not applied: the projector's norm stands in its place, starts from its
    weights and is exported instead of it."""
    like: str = ""
    """A tensor of the module that is as long as those of `norm` and `neutral`."""
    model_type: str
    """What config.json calls the encoder in an export."""
    keys: dict[str, str]
    """Our settings that are one of config.json each."""

    @property
    def name(self) -> str:
        """The name of its file, which the setting `encoder` gives."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def build(self, config: Any) -> nn.Module:
        """Return the module of the settings `config`, with random weights."""

    @abstractmethod
    def features(self, tower: nn.Module, batch: Tensor) -> Tensor:
        """Return the features of a batch of units that are equally large: (num_units, num_tokens, width)."""

    def described(self, folder: dict[str, Any]) -> dict[str, Any]:
        """Return the description of the encoder in the config.json of a pretrained folder."""
        return folder

    def fitted(self, weights: dict[str, Tensor], tower: nn.Module) -> dict[str, Tensor]:
        """Return the renamed weights of a file, in the form that `tower` keeps them in."""
        return weights

    @abstractmethod
    def description(self, config: Any) -> dict[str, Any]:
        """Return what config.json says of the encoder in an export."""

    def settings(self, description: dict[str, Any]) -> dict[str, Any]:
        """Return our settings that make `description` of an encoder."""
        return {ours: description[theirs] for ours, theirs in self.keys.items() if theirs in description}

    def first_tokens(self, config: Any) -> int:
        """Return the tokens that the module in an export puts before those of the unit: class token, registers."""
        return 0

    def neutral(self, config: Any) -> Iterator[str]:
        """Yield the names of vectors that the class in an export has and ours lacks: ones, which change nothing."""
        yield from ()

    def exported(self, name: str) -> str:
        """Return the name of one of the module's tensors in an export."""
        return name

    def imported(self, name: str) -> str:
        """Return the module's name of a tensor of an export."""
        return name
