"""The modalities beside text, each a folder. Another one is its folder, and its name in the tuple below."""

from collections.abc import Mapping

from megatron_mm.modalities.audio.spec import AUDIO
from megatron_mm.modalities.image.spec import IMAGE
from megatron_mm.modalities.modality import RANDOM, EncoderSection, Geometry, Modality

MODALITIES: tuple[Modality, ...] = (IMAGE, AUDIO)

BY_NAME = {modality.name: modality for modality in MODALITIES}
BY_KIND = {modality.kind: modality for modality in MODALITIES}
"""The modalities by the number that the media index of shards has of each."""
Geometries = Mapping[str, Geometry]
"""How items become tokens, by the name of their modality."""


def default_geometries() -> dict[str, Geometry]:
    """Return the geometry of each modality as it is where nobody says otherwise."""
    return {modality.name: modality.geometry() for modality in MODALITIES}


__all__ = [
    "BY_KIND",
    "BY_NAME",
    "MODALITIES",
    "RANDOM",
    "EncoderSection",
    "Geometries",
    "Geometry",
    "Modality",
    "default_geometries",
]
