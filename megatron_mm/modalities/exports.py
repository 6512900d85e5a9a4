"""A modality's part in Hugging Face folders: the interface of its file `hf`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from megatron_mm.errors import ConfigError, DataError
from megatron_mm.modalities.family import Family
from megatron_mm.modalities.modality import Modality

FREE_KEYS = ("architectures", "layerdrop", "use_mean_pooling", "layer_scale_init_value")
"""Settings of an encoder that say nothing about what its weights mean; neither do dropout and masking."""


class Stock(Protocol):
    """A class of transformers that takes text and one modality: what an export of these two consists of."""

    model_type: str
    architecture: str
    auto_class: str
    """The class of transformers that loads it."""
    pipeline: str
    """What Hugging Face calls the task."""
    token_names: dict[str, str]
    """Attributes that its processor wants of the tokenizer beside the usual, and the roles of the tokens."""

    def refusal(self, section: Any) -> str | None:
        """Return why the class cannot have the encoder of `section`, None if it can."""

    def config(self, section: Any) -> dict[str, Any]:
        """Return what its config.json says of the modality beside its encoder."""

    def processor(self, section: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Return the parts of its processor, by their names, and the settings of its own."""

    def files(self, section: Any) -> dict[str, dict[str, Any]]:
        """Return what else is in the folder, by the name of the file."""


class Exports(ABC):
    """Names, settings and inputs of one modality in exports and in folders that are imported."""

    modality: Modality
    describes: str
    """The key of config.json that describes the encoder."""
    tower: str
    projector: str
    """The submodules of an export's model."""
    inputs: tuple[str, ...]
    """What an export's model is given for this modality's items."""
    takes: str
    """The items in the words of a model card."""
    stock: Stock | None = None

    @abstractmethod
    def config(self, section: Any) -> dict[str, Any]:
        """Return what the config.json of a full export says of the modality beside its encoder."""

    @abstractmethod
    def processor(self, section: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Return the parts that a full export's processor has for the modality, and the settings of its own."""

    @abstractmethod
    def model_inputs(self, items: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """Return what an export's model is given for `items`, each the units that the modality's decoder makes."""

    def family(self, description: dict[str, Any]) -> Family:
        """Return the family of the encoder that a config.json describes. Raises ConfigError if there is none."""
        own, name = description.get(self.describes), self.modality.name
        if own is None:
            raise ConfigError(f"the folder's config.json has no {self.describes}: its {name} encoder is not described.")
        if not isinstance(own, dict) or not isinstance(own.get("model_type", ""), str):
            raise DataError(f"the folder's config.json has a {self.describes} that describes no encoder: {own!r:.80}.")
        families = [self.modality.family_of(encoder) for encoder in self.modality.encoders()]
        usual = self.modality.family_of(self.modality.section.model_fields["encoder"].default)
        kind = own.get("model_type", usual.model_type)
        found = next((family for family in families if family.model_type == kind), None)
        if found is None:
            known = ", ".join(family.model_type for family in families)
            raise ConfigError(f"{self.describes}.model_type={kind} is not imported: {known} are.")
        return found

    def settings(self, description: dict[str, Any]) -> dict[str, Any]:
        """Return our settings of the modality that make a folder's config.json. Raises ConfigError as `family`."""
        family = self.family(description)
        return {"encoder": family.name} | family.settings(description[self.describes])

    def unlike(self, description: dict[str, Any], section: Any) -> list[str]:
        """Return what a folder's config.json says of the modality that the settings `section` have otherwise."""
        ours = self.modality.family(section).description(section)
        beside = self.config(section) | (self.stock.config(section) if self.stock else {})
        pairs = [(f"{self.describes}.", description[self.describes], ours), ("", description, beside)]
        return [
            f"{where}{key}={theirs[key]}, ours has {value}"
            for where, theirs, own in pairs
            for key, value in own.items()
            if key not in FREE_KEYS
            and not key.endswith(("dropout", "_prob"))
            and theirs.get(key, value) != value
            and [theirs[key]] * 2 != value  # a square's side
        ]
