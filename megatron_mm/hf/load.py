"""A Hugging Face folder as the start of a run: a checkpoint of weights that training loads in any layout."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from pydantic import ConfigDict

from megatron_mm import config as configs
from megatron_mm.checkpoint.format import TOKENIZER
from megatron_mm.checkpoint.index import PRECISIONS, TensorInfo
from megatron_mm.checkpoint.write import write_weights
from megatron_mm.config import Config
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.hf import files, weight_map
from megatron_mm.hf.export import verify_if_listed
from megatron_mm.hf.stream import blocks, check_complete, explained, info_of
from megatron_mm.hf.tensors import SafetensorsReader
from megatron_mm.hf.weight_map import Target, whole
from megatron_mm.model.shapes import compare_shapes, tensor_shapes
from megatron_mm.outside import checked, load_json
from megatron_mm.settings import PositiveInt

TEXT_MODELS = ("llama", "mistral", "qwen3")
"""Model types whose layers are ours: RMSNorm, SwiGLU, rotary halves, no biases."""
PARTS = {exports.stock.model_type: (name,) for name, exports in files.EXPORTS.items() if exports.stock}
PARTS["megatron_mm"] = tuple(files.EXPORTS)
"""Model types that hold encoders and projectors as well, as our exports do."""
DEFAULTS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None}
"""What our decoder has, and what a configuration that does not say otherwise means."""


class Decoder(TypedDict):
    """What config.json says of the decoder."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    num_attention_heads: PositiveInt
    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    num_key_value_heads: NotRequired[PositiveInt | None]
    head_dim: NotRequired[PositiveInt | None]
    rms_norm_eps: NotRequired[float]
    rope_theta: NotRequired[float | None]
    rope_parameters: NotRequired[dict[str, Any] | None]
    rope_scaling: NotRequired[dict[str, Any] | None]
    use_sliding_window: NotRequired[bool]


def import_folder(folder: Path, out: Path, *, preset: str, overrides: Sequence[str] = (), check: bool = True) -> Config:
    """Write the weights of a Llama-family folder, or of one of our exports, as a checkpoint; return its configuration.

    The run's settings are those of `preset`, with decoder and encoders of the folder, no pretrained file for encoders
    that it has, and `overrides`; they are saved in the checkpoint, with training.start_from naming it. model.vocab_size
    may be larger than the folder's: new rows of embedding and head start as the mean of the others. Streams blocks of
    rows, like `export`. The files of an export are compared with its manifest first, unless `check` is
    false. Raises ConfigError for a decoder or an encoder that is not ours, DataError for a damaged folder
    or one with missing or unexpected tensors.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: name a folder that does not, or remove it.")
    description = read_description(folder)
    if check:
        verify_if_listed(folder)
    found = decoder_settings(description) | encoder_settings(description)
    settings = [f"{key}={value}" for key, value in found.items()]
    settings += [f"{part}.pretrained=null" for part in PARTS.get(description["model_type"], ())]
    config = configs.load(preset, [*settings, f"training.start_from={out}", *overrides])
    _check_encoders(description, config)
    reader = SafetensorsReader(folder)
    source = _Grown(reader, vocab_size=config.model.vocab_size)
    targets = _targets(reader, config, kind=description["model_type"])
    dtype = PRECISIONS[config.training.precision]
    resolved = [(target, info_of(target, source, dtype=dtype)) for target in targets]
    check_complete(source, targets, where=str(folder), without=_ignored(reader, config, description["model_type"]))
    _check_shapes(resolved, config, where=folder, parts=PARTS.get(description["model_type"], ()))
    num_bytes = sum(info.shape[0] * info.row_bytes for _, info in resolved)
    weights = [(target.name, info, blocks(target, source, dtype=info.dtype)) for target, info in resolved]
    beside = {"config.yaml": configs.to_yaml(config).encode()}
    if (folder / TOKENIZER).exists():
        beside[TOKENIZER] = (folder / TOKENIZER).read_bytes()
    try:
        write_weights(out, weights, num_layers=config.model.num_layers, files=beside)
    except OSError as error:
        raise explained(error, out.parent, num_bytes) from error
    return config


def decoder_settings(description: dict[str, Any]) -> dict[str, Any]:
    """Return our model.* settings of a Hugging Face configuration. Raises ConfigError if it is no decoder of ours."""
    text = description.get("text_config", description)
    kind = description.get("model_type")
    if not isinstance(text, dict):
        raise DataError(
            f"config.json has a text_config that describes no decoder: {text!r:.80}. Copy the folder again."
        )
    if kind not in [*TEXT_MODELS, *PARTS] or text.get("model_type", kind) not in TEXT_MODELS:
        raise ConfigError(f"model_type={kind} is not imported: {', '.join((*TEXT_MODELS, *PARTS))} are.")
    checked(text, Decoder, where="config.json", hint="Copy the folder again.")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    found = {key: text.get(key, value) for key, value in DEFAULTS.items()}
    found["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if not text.get("use_sliding_window", True):
        found["sliding_window"] = None
    wrong = {k: v for k, v in found.items() if v != (DEFAULTS | {"rope_type": "default"})[k]}
    if wrong:
        raise ConfigError(f"our decoder has no {', '.join(f'{key}={value}' for key, value in wrong.items())}.")
    heads = text["num_attention_heads"]
    return {
        "model.num_layers": text["num_hidden_layers"],
        "model.hidden_size": text["hidden_size"],
        "model.ffn_hidden_size": text["intermediate_size"],
        "model.num_attention_heads": heads,
        "model.num_query_groups": text.get("num_key_value_heads") or heads,
        "model.head_dim": text.get("head_dim") or text["hidden_size"] // heads,
        "model.vocab_size": text["vocab_size"],
        "model.rope_theta": float(text.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        "model.norm_epsilon": text.get("rms_norm_eps", 1e-6),
        "model.qk_norm": str(text.get("model_type", kind) == "qwen3").lower(),
    }


def encoder_settings(description: dict[str, Any]) -> dict[str, Any]:
    """Return our settings of the encoders that a Hugging Face configuration has, as image.* and so on.

    Raises ConfigError if it says nothing of one that its model type has, DataError if what it says is of other types.
    """
    found = {}
    for part in PARTS.get(description["model_type"], ()):
        with _describing(part):
            found |= {f"{part}.{key}": value for key, value in files.EXPORTS[part].settings(description).items()}
    return found


@contextlib.contextmanager
def _describing(part: str) -> Iterator[None]:
    """Raise DataError for what config.json says of an encoder with values of other types than it has."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise DataError(
            f"what config.json says of the {part} encoder is not what it should be ({type(error).__name__}: {error}). "
            "Copy the folder again."
        ) from error


def _check_encoders(description: dict[str, Any], config: Config) -> None:
    """Raise ConfigError with all that the folder says of its encoders and that ours have otherwise."""
    parts = PARTS.get(description["model_type"], ())
    wrong = []
    for part in parts:
        with _describing(part):
            wrong += files.EXPORTS[part].unlike(description, config.encoders[part])
    if parts:
        pairs = files.FULL_PROJECTORS.items()
        wrong += [f"{k}={description[k]}, ours has {v}" for k, v in pairs if description.get(k, v) != v]
    if wrong:
        raise ConfigError("the folder's encoders are not those of this run:\n  " + "\n  ".join(dict.fromkeys(wrong)))


def _check_shapes(
    resolved: Sequence[tuple[Target, TensorInfo]], config: Config, *, where: Path, parts: Sequence[str]
) -> None:
    """Raise DataError if what is to be written is not the run's model, apart from encoders that a folder has not."""
    media = tuple(f"embedding.{part}." for part in files.EXPORTS if part not in parts)
    expected = {name: shape for name, shape in tensor_shapes(config).items() if not name.startswith(media)}
    wrong = compare_shapes({target.name: info.shape for target, info in resolved}, expected)
    if wrong:
        raise DataError(f"{where} is not the model that its config.json describes:\n  " + "\n  ".join(wrong))


def read_description(folder: Path) -> dict[str, Any]:
    """Return what the config.json of a Hugging Face folder says. Raises DataError if it is damaged or not there."""
    path = folder / "config.json"
    try:
        return checked(load_json(path.read_bytes()), dict[str, Any], where="it")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): a Hugging Face folder has one. Copy it again.") from error


def _targets(reader: SafetensorsReader, config: Config, *, kind: str) -> list[Target]:
    """Return our tensors as rows of the folder's. Raises DataError with what is missing and what is left over."""
    ignored = _ignored(reader, config, kind)
    own = [name for name in reader.tensors if name not in ignored]
    prefix = "model.language_model." if kind in PARTS else "model."
    targets = weight_map.inverted(list(weight_map.decoder(config.model, prefix=prefix)))
    if "lm_head.weight" not in own:  # tied: the head starts as the embedding
        tied = Target(
            "output_layer.weight", (weight_map.Rows(f"{prefix}embed_tokens.weight", 0, config.model.vocab_size),)
        )
        targets = [tied if target.name == tied.name else target for target in targets]
    rows = {name: reader.tensors[name].shape[0] for name in own}
    for part in PARTS.get(kind, ()):
        targets += files.media_map(part, config).sources(rows)
    used = {rows.source for target in targets for rows in target.rows}
    missing, unexpected = sorted(used - set(own)), sorted(set(own) - used)
    if missing or unexpected:
        raise DataError(
            f"the folder's tensors are not those of its config.json. Missing: {', '.join(missing) or 'none'}. "
            f"Unexpected: {', '.join(unexpected) or 'none'}."
        )
    return targets


def _ignored(reader: SafetensorsReader, config: Config, kind: str) -> set[str]:
    """Return what of the folder says nothing: constants, and vectors that scale layers by one.

    Raises DataError if one of these is not one.
    """
    neutral = {
        name
        for part in PARTS.get(kind, ())
        for name in files.media_map(part, config).neutral()
        if name in reader.tensors
    }
    scaled = [name for name in neutral if (reader.read_rows(name, 0, reader.tensors[name].shape[0]) != 1).any()]
    if scaled:
        raise DataError(f"{', '.join(sorted(scaled))} scale layers of an encoder, which ours cannot.")
    return neutral | {name for name in reader.tensors if name.endswith(weight_map.CONSTANTS)}


class _Grown:
    """A folder whose embedding and head have more rows: the new ones are the mean of the others."""

    def __init__(self, reader: SafetensorsReader, *, vocab_size: int) -> None:
        self._reader, self._means = reader, {}
        self.tensors: dict[str, TensorInfo] = dict(reader.tensors)
        for name, info in reader.tensors.items():
            if name.endswith("embed_tokens.weight") or name == "lm_head.weight":
                self.tensors[name] = TensorInfo((max(vocab_size, info.shape[0]), *info.shape[1:]), info.dtype)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows start to stop of a tensor."""
        there = self._reader.tensors[name].shape[0]
        block = self._reader.read_rows(name, min(start, there), min(stop, there))
        if stop <= there:
            return block
        if name not in self._means:
            target = whole(name, name, there)
            parts = blocks(target, self._reader, dtype=block.dtype)
            self._means[name] = (sum(part.double().sum(0) for part in parts) / there).to(block.dtype)
        return torch.cat([block, self._means[name].expand(stop - max(start, there), -1)])
