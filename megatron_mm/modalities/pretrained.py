"""Pretrained encoders into the model: ViT of timm or Hugging Face, Wav2Vec 2.0 of torchaudio or Hugging Face.

The names in a file tell which library wrote it. Every key is accounted for: it is a weight of the encoder, or on a list
of what an encoder leaves behind (classification heads, pretraining objectives); anything else is an error.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mm.errors import DataError
from megatron_mm.modalities import BY_NAME, RANDOM, EncoderSection

log = logging.getLogger(__name__)

NAMED = 8
"""Tensors of a kind that a message names."""
VISION_LEFT_BEHIND = r"(vit\.)?(head|fc_norm|classifier|pooler)\..*"
AUDIO_LEFT_BEHIND = (
    r"(aux|lm_head|quantizer|project_q|project_hid|classifier|projector)\..*|(wav2vec2\.)?masked_spec_embed"
)
VISION_NAMES = (
    # timm
    (r"blocks\.", "layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.", ".attention."),
    (r"^norm\.", "layernorm."),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    # Hugging Face, as transformers 4 names them and transformers 5 still writes them
    (r"^vit\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda found: f".attention.{found[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)
AUDIO_NAMES = (
    # torchaudio
    (r"^encoder\.feature_projection\.", "feature_projection."),
    (r"^encoder\.transformer\.", "encoder."),
    # Hugging Face
    (r"^wav2vec2\.", ""),
    # weight norm as older versions of torch keep it
    (r"\.conv\.weight_g$", ".conv.parametrizations.weight.original0"),
    (r"\.conv\.weight_v$", ".conv.parametrizations.weight.original1"),
)
"""What turns the names of each library into those of our encoders, one after the other."""
VISION_MEANING = ("num_attention_heads", "hidden_act", "patch_size")
AUDIO_MEANING = (
    *("num_attention_heads", "num_conv_pos_embedding_groups", "hidden_act", "feat_extract_activation"),
    *("feat_extract_norm", "do_stable_layer_norm", "conv_kernel", "conv_stride"),
)
"""Settings of a Hugging Face folder that change what its weights mean, and mostly no shape."""


def load_pretrained(chunks: Sequence[Any], encoders: Mapping[str, EncoderSection]) -> None:
    """Give the encoders of this rank the weights of the files that their settings name. No communication.

    The image projector's norm starts from the published final norm, in whose place it stands. An encoder whose setting
    names no file is as it was: of random weights, or as training.start_from has it.
    """
    for chunk in chunks:
        if not chunk.pre_process:
            continue
        for name, section in encoders.items():
            part = chunk.embedding.media[name]
            if file := file_of(section):
                LOADERS[name](part.encoder.tower, file)
                if name == "image":
                    with torch.no_grad():
                        part.projector.norm.weight.copy_(part.encoder.tower.layernorm.weight)
                        part.projector.norm.bias.copy_(part.encoder.tower.layernorm.bias)
            elif section.pretrained == RANDOM:
                log.info("%s encoder: random weights, as %s.pretrained=random says", name, name)
            else:
                log.info("%s encoder: as training.start_from has it", name)


def check_pretrained(encoders: Mapping[str, EncoderSection]) -> None:
    """Pass if the files that settings name fit the encoders; no model is needed for it. Raises DataError."""
    for name, section in encoders.items():
        if file := file_of(section):
            with torch.device("meta"):
                encoder = BY_NAME[name].part("encoder").Encoder(section)
            LOADERS[name](encoder.tower, file)


def file_of(encoder: EncoderSection) -> Path | None:
    """Return the pretrained file that an encoder's settings name, None if they name none."""
    return None if encoder.pretrained in (None, RANDOM) else Path(encoder.pretrained)


def load_vision(tower: nn.Module, path: Path) -> None:
    """Load a ViT file into the image encoder; position embeddings of another resolution are resized.

    Raises DataError with every key that is missing, unexpected, or of another shape.
    """
    _check_meaning(tower, path, VISION_MEANING, section="image")
    weights = {}
    for name, value in _renamed(read_weights(path), VISION_NAMES, VISION_LEFT_BEHIND, path).items():
        fused = re.fullmatch(r"(.*\.attention)\.qkv\.(weight|bias)", name)
        if fused:  # timm: all queries, all keys, all values
            parts = zip(("q", "k", "v"), value.chunk(3))
            weights |= {f"{fused[1]}.{letter}_proj.{fused[2]}": part for letter, part in parts}
        else:
            weights[name] = value
    positions = "embeddings.position_embeddings"
    if positions in weights:
        own = tower.get_parameter(positions)
        weights[positions] = resize_positions(weights[positions], num_tokens=own.shape[1])
    hint = "image.num_layers, hidden_size, ffn_hidden_size"
    _fill(tower, weights, path, encoder="image", hint=hint)


def load_audio(tower: nn.Module, path: Path) -> None:
    """Load a Wav2Vec 2.0 file into the sound encoder.

    Raises DataError with every key that is missing, unexpected, or of another shape.
    """
    _check_meaning(tower, path, AUDIO_MEANING, section="audio")
    weights = _renamed(read_weights(path), AUDIO_NAMES, AUDIO_LEFT_BEHIND, path)
    hint = "audio.form, num_layers, hidden_size, ffn_hidden_size"
    _fill(tower, weights, path, encoder="audio", hint=hint)


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


def _check_meaning(tower: nn.Module, path: Path, keys: Sequence[str], *, section: str) -> None:
    """Raise DataError if the config.json of a Hugging Face folder describes another encoder than `tower`."""
    file = path / "config.json"
    if not file.is_file():
        return
    try:
        description = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    own = {key: getattr(tower.config, key) for key in keys}
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
    wrong = [
        f"{key}={description[key]}, ours {value}" for key, value in own.items() if description.get(key, value) != value
    ]
    if wrong:
        raise DataError(f"{file} describes another encoder than the settings {section}.*: {'; '.join(wrong)}.")


def _renamed(weights: dict[str, Tensor], names: Sequence[tuple], left_behind: str, path: Path) -> dict[str, Tensor]:
    """Return `weights` under our names, without what an encoder leaves behind.

    Raises DataError if two of them would have one name.
    """
    result, origins = {}, {}
    for origin, value in weights.items():
        if re.fullmatch(left_behind, origin):
            continue
        name = origin
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if name in result:
            raise DataError(f"{path} holds {origins[name]} and {origin}, which are the same tensor of the encoder.")
        result[name], origins[name] = value, origin
    return result


def resize_positions(positions: Tensor, *, num_tokens: int) -> Tensor:
    """Return position embeddings for another number of patches: bicubic with antialiasing, as timm does.

    Shapes: positions (1, 1 + old_patches, width), the class token first; returns (1, num_tokens, width). Raises
    DataError if the patches are no square.
    """
    if positions.shape[1] == num_tokens:
        return positions
    old, new = round((positions.shape[1] - 1) ** 0.5), round((num_tokens - 1) ** 0.5)
    if old * old + 1 != positions.shape[1]:
        raise DataError(f"{positions.shape[1]} position embeddings are not a class token and a square of patches.")
    first, grid = positions[:, :1], positions[:, 1:].float()
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, width, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    log.info("position embeddings resized from %d x %d to %d x %d patches", old, old, new, new)
    return torch.cat([first, grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(first.dtype)], dim=1)


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
        raise DataError(f"{path} does not fit the encoder ({hint}).\n" + "\n".join(wrong))
    if any(parameter.is_meta for parameter in own.values()):
        return
    for name, parameter in own.items():
        parameter.copy_(weights[name])
    log.info("%s encoder: %d pretrained tensors of %s", encoder, len(own), path)


LOADERS = {"image": load_vision, "audio": load_audio}
