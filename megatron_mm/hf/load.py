"""A Hugging Face folder as the start of a run: a checkpoint of weights that training loads in any layout."""

import json
import os
import pickle
import shutil
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from tqdm import tqdm

from megatron_mm import config as configs
from megatron_mm.checkpoint.index import PRECISIONS, TensorInfo, TensorSource, check_archive
from megatron_mm.config import Config
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.hf import files, weight_map
from megatron_mm.hf.stream import SYNC_BYTES, blocks, check_complete, explained, info_of, require_space
from megatron_mm.hf.tensors import SafetensorsReader
from megatron_mm.hf.weight_map import Target, whole
from megatron_mm.model.shapes import compare_shapes, tensor_shapes
from megatron_mm.storage import PARTIAL, publish_folder

TEXT_MODELS = ("llama", "mistral", "qwen3")
"""Model types whose layers are ours: RMSNorm, SwiGLU, rotary halves, no biases."""
PARTS = {exports.stock.model_type: (name,) for name, exports in files.EXPORTS.items() if exports.stock}
PARTS["megatron_mm"] = tuple(files.EXPORTS)
"""Model types that hold encoders and projectors as well, as our exports do."""
FILE_BYTES = 4 << 30
"""Of one file of the checkpoint."""
DEFAULTS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None}
"""What our decoder has, and what a configuration that does not say otherwise means."""


def import_folder(folder: Path, out: Path, *, preset: str, overrides: Sequence[str] = ()) -> Config:
    """Write the weights of a Llama-family folder, or of one of our exports, as a checkpoint; return its configuration.

    The run's settings are those of `preset`, with decoder and encoders of the folder, no pretrained file for encoders
    that it has, and `overrides`; they are saved in the checkpoint, with training.start_from naming it. model.vocab_size
    may be larger than the folder's: new rows of embedding and head start as the mean of the others. Streams blocks of
    rows, like `export`. Raises ConfigError for a decoder or an encoder that is not ours, DataError for a damaged folder
    or one with missing or unexpected tensors.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: name a folder that does not, or remove it.")
    description = _read_json(folder / "config.json")
    found = decoder_settings(description) | encoder_settings(description)
    settings = [f"{key}={value}" for key, value in found.items()]
    settings += [f"{part}.pretrained=null" for part in PARTS.get(description["model_type"], ())]
    config = configs.load(preset, [*settings, f"training.start_from={out}", *overrides])
    _check_encoders(description, config)
    reader = SafetensorsReader(folder)
    source = _Grown(reader, vocab_size=config.model.vocab_size)
    targets = _targets(reader, config, kind=description["model_type"])
    partial = out.with_name(out.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # nothing of it is looked at again
    partial.mkdir(parents=True)
    dtype = PRECISIONS[config.training.precision]
    resolved = [(target, info_of(target, source, dtype=dtype)) for target in targets]
    check_complete(source, targets, where=str(folder), without=_ignored(reader, config, description["model_type"]))
    _check_shapes(resolved, config, where=folder, parts=PARTS.get(description["model_type"], ()))
    require_space(partial, sum(info.shape[0] * info.row_bytes for _, info in resolved))
    try:
        _write(partial, resolved, source, num_layers=config.model.num_layers)
    except OSError as error:
        raise explained(error, partial, sum(info.shape[0] * info.row_bytes for _, info in resolved)) from error
    (partial / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (partial / "config.yaml").write_text(configs.to_yaml(config))
    if (folder / "tokenizer.json").exists():
        shutil.copyfile(folder / "tokenizer.json", partial / "tokenizer.json")
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    (partial / "manifest.json").write_text(json.dumps({"step": 0, "bytes": sizes}, indent=1))
    publish_folder(partial, out)
    return config


def decoder_settings(description: dict[str, Any]) -> dict[str, Any]:
    """Return our model.* settings of a Hugging Face configuration. Raises ConfigError if it is no decoder of ours."""
    text = description.get("text_config", description)
    kind = description.get("model_type")
    if kind not in (*TEXT_MODELS, *PARTS) or text.get("model_type", kind) not in TEXT_MODELS:
        raise ConfigError(f"model_type={kind} is not imported: {', '.join((*TEXT_MODELS, *PARTS))} are.")
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

    Raises ConfigError if it says nothing of one that its model type has.
    """
    return {
        f"{part}.{key}": value
        for part in PARTS.get(description["model_type"], ())
        for key, value in files.EXPORTS[part].settings(description).items()
    }


def _check_encoders(description: dict[str, Any], config: Config) -> None:
    """Raise ConfigError with all that the folder says of its encoders and that ours have otherwise."""
    parts = PARTS.get(description["model_type"], ())
    wrong = [line for part in parts for line in files.EXPORTS[part].unlike(description, config.encoders[part])]
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
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


def _write(
    folder: Path, tensors: Sequence[tuple[Target, TensorInfo]], source: TensorSource, *, num_layers: int
) -> None:
    """Write tensors as megatron-core lays them out: global ones, equal layers stacked, in blocks of rows."""
    chunks: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
    sizes: dict[str, torch.Size] = {}
    dtypes: dict[str, torch.dtype] = {}
    total = sum(info.shape[0] * info.row_bytes for _, info in tensors)
    # One block is read while another one is written and those before are read back.
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="import") as progress,
        ThreadPoolExecutor(1) as writer,
        _Files(folder) as file,
    ):
        written: dict[MetadataIndex, Future[_StorageInfo]] = {}
        place = None
        for target, info in tensors:
            key, layer = _stacked(target.name)
            row = 0
            sizes[key] = torch.Size((*((num_layers,) if layer is not None else ()), *info.shape))
            dtypes[key] = info.dtype
            for block in blocks(target, source, dtype=info.dtype):
                offsets = torch.Size((*((layer,) if layer is not None else ()), row, *(0,) * (block.dim() - 1)))
                row += block.shape[0]
                value = block if layer is None else block.unsqueeze(0)
                chunks[key].append(ChunkStorageMetadata(offsets, value.shape))
                if place is not None:
                    written[place].result()
                place = MetadataIndex(key, offsets)
                written[place] = writer.submit(file.append, value)
                progress.update(block.nbytes)
        stored = {place: pending.result() for place, pending in written.items()}
        # megatron-core looks for what is not a tensor here: a run's scheduler, none in bare weights.
        stored[MetadataIndex("common_state/shard_0_1")] = file.append([{}])
    described: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtypes[key]), size, chunks[key]) for key, size in sizes.items()
    }
    described["common_state/shard_0_1"] = BytesStorageMetadata()
    with (folder / ".metadata").open("wb") as index:
        pickle.dump(Metadata(described, storage_data=stored), index)


class _Files:
    """Appends archives to files of at most FILE_BYTES, and compares each with its checksum on the way to the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self._checker, self._pending = ThreadPoolExecutor(1), None
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._end()
        finally:
            self._checker.shutdown()

    def append(self, value: Any) -> _StorageInfo:
        """Write a tensor, or a plain object, as torch.save does; return where it is."""
        if self._file.tell() > FILE_BYTES:
            self._end()
            self._number += 1
            self._begin()
        start = self._file.tell()
        torch.save(value, self._file)
        end = self._file.tell()
        self._unchecked.append((start, end - start))
        if end - self._unchecked[0][0] > SYNC_BYTES:
            self._check()
        return _StorageInfo(self._path.name, start, end - start)

    def _begin(self) -> None:
        self._path = self._folder / f"__0_{self._number}.distcp"
        self._file = self._path.open("wb")
        self._unchecked: list[tuple[int, int]] = []

    def _end(self) -> None:
        self._check()
        self._pending.result()
        self._file.close()

    def _check(self) -> None:
        self._file.flush()
        if self._pending is not None:
            self._pending.result()
        self._pending = self._checker.submit(_sync_and_check, self._path, self._unchecked)
        self._unchecked = []


def _sync_and_check(path: Path, places: list[tuple[int, int]]) -> None:
    """Bring a file to the disk and compare the archives at (offset, length) with their checksums."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
        for offset, length in places:
            check_archive(descriptor, offset, length, where=path)
    finally:
        os.close(descriptor)


def _stacked(name: str) -> tuple[str, int | None]:
    """Return the name under which a tensor is stacked with those of the other layers, and its layer."""
    if not name.startswith("decoder.layers."):
        return name, None
    layer, _, rest = name.removeprefix("decoder.layers.").partition(".")
    return f"decoder.layers.{rest}", int(layer)
