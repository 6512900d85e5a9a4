"""Pretrained encoders into the model, from the files of the libraries that its families know.

The names in a file tell which library wrote it. Every key is accounted for: it is a weight of the encoder, or on a list
of what an encoder leaves behind (classification heads, pretraining objectives); anything else is an error.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_mm.errors import DataError
from megatron_mm.modalities import MODALITIES, RANDOM, EncoderSection, Modality
from megatron_mm.modalities.family import Family
from megatron_mm.retry import retrying

log = logging.getLogger(__name__)

NAMED = 8
"""Tensors of a kind that a message names."""


def load_pretrained(chunks: Sequence[nn.Module], encoders: Mapping[str, EncoderSection]) -> None:
    """Give the encoders of this rank the weights that the `pretrained` of their sections name. No communication.

    A projector's norm that stands in the place of a published final norm starts from it. An encoder whose setting names
    no file is as it was: of random weights, or as training.start_from has it.
    """
    for chunk in chunks:
        if not chunk.pre_process:
            continue
        for modality in MODALITIES:
            name, section = modality.name, encoders[modality.name]
            if file := file_of(section):
                _load(chunk.embedding.media[name], modality.family(section), file, name=name)
            elif section.pretrained == RANDOM:
                log.info("%s encoder: random weights, as %s.pretrained=random says", name, name)
            else:
                log.info("%s encoder: as training.start_from has it", name)


@torch.no_grad()
def _load(media: nn.Module, family: Family, file: Path, *, name: str) -> None:
    load_tower(media.encoder.tower, family, file, name=name)
    if family.norm:
        norm, own = media.encoder.tower.get_submodule(family.norm), media.projector.norm
        times = own.weight.numel() // norm.weight.numel()  # features that are several of the tower's end to end
        own.weight.copy_(norm.weight.repeat(times))
        own.bias.copy_(norm.bias.repeat(times))


def check_pretrained(encoders: Mapping[str, EncoderSection]) -> None:
    """Pass if the files that the `pretrained` of the sections name fit the encoders; no model is needed for it.

    Raises DataError as `load_tower`.
    """
    for modality in MODALITIES:
        section = encoders[modality.name]
        if file := file_of(section):
            load_tower(_on_meta(modality, section), modality.family(section), file, name=modality.name)


def _on_meta(modality: Modality, section: EncoderSection) -> nn.Module:
    with torch.device("meta"):
        return modality.part("encoder").Encoder(section).tower


def file_of(section: EncoderSection) -> Path | None:
    """Return the pretrained file that an encoder's settings name, None if they name none."""
    return None if section.pretrained in (None, RANDOM) else Path(section.pretrained)


def load_tower(tower: nn.Module, family: Family, path: Path, *, name: str) -> None:
    """Load a pretrained file into the tower of the modality `name`.

    Raises DataError with every key that is missing, unexpected, or of another shape.
    """
    _check_meaning(tower, path, family, section=name)
    weights = family.fitted(_renamed(read_weights(path), family, path), tower)
    _fill(tower, weights, path, encoder=name, hint=family.sizes)


def find_weights(path: Path) -> Path:
    """Return the file of weights that `path` is, or holds if it is a Hugging Face folder. Raises DataError."""
    candidates = [path / name for name in ("model.safetensors", "pytorch_model.bin")] if path.is_dir() else [path]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise DataError(f"{path} does not exist, or holds neither model.safetensors nor pytorch_model.bin.")
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, or of a Hugging Face folder. Nothing in it is executed."""
    from safetensors.torch import load_file

    file = find_weights(path)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise what they like
        raise DataError(f"{file} cannot be read as weights: {type(error).__name__}: {error}") from error
    while isinstance(loaded, dict) and set(loaded) & {"state_dict", "model"}:
        loaded = loaded.get("state_dict", loaded.get("model"))
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise DataError(f"{file} holds no dictionary of tensors.")
    return loaded


def _check_meaning(tower: nn.Module, path: Path, family: Family, *, section: str) -> None:
    """Raise DataError if the config.json of a Hugging Face folder describes another encoder than `tower`."""
    file = path / "config.json"
    if not file.is_file():
        return
    try:
        description = family.described(dict(json.loads(retrying(file.read_text, what=file))))
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    own = {key: getattr(tower.config, key) for key in family.meaning}
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
    wrong = [
        f"{key}={description[key]}, ours {value}" for key, value in own.items() if description.get(key, value) != value
    ]
    if wrong:
        raise DataError(f"{file} describes another encoder than the settings {section}.*: {'; '.join(wrong)}.")


def _renamed(weights: dict[str, Tensor], family: Family, path: Path) -> dict[str, Tensor]:
    """Return `weights` under our names, without what an encoder leaves behind.

    Raises DataError if two of them would have one name.
    """
    result, origins = {}, {}
    for origin, value in weights.items():
        if re.fullmatch(family.left_behind, origin):
            continue
        name = origin
        for pattern, replacement in family.names:
            name = re.sub(pattern, replacement, name)
        if name in result:
            raise DataError(f"{path} holds {origins[name]} and {origin}, which are the same tensor of the encoder.")
        result[name], origins[name] = value, origin
    return result


@torch.no_grad()
def _fill(tower: nn.Module, weights: dict[str, Tensor], path: Path, *, encoder: str, hint: str) -> None:
    own = dict(tower.named_parameters())
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    other = [
        f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": sorted(other)}
    wrong = [
        f"{len(names)} {what}: {', '.join(names[:NAMED])}{' ...' * (len(names) > NAMED)}"
        for what, names in lists.items()
        if names
    ]
    if wrong:
        raise DataError(f"{path} does not fit the encoder ({hint}).\n  " + "\n  ".join(wrong))
    if any(parameter.is_meta for parameter in own.values()):
        return
    for name, parameter in own.items():
        parameter.copy_(weights[name])
    log.info("%s encoder: %d pretrained tensors of %s", encoder, len(own), path)
