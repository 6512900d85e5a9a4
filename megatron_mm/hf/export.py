"""A training checkpoint as Hugging Face folders: stock text, stock text and one modality, and everything."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from pydantic import ConfigDict
from tqdm import tqdm

from megatron_mm import config as configs
from megatron_mm.checkpoint.index import CheckpointReader, TensorInfo
from megatron_mm.checkpoint.verify import check_source
from megatron_mm.config import Config
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.hf import files, weight_map
from megatron_mm.hf.stream import (
    Shard,
    check_complete,
    check_sha256,
    explained,
    info_of,
    pack,
    write_shard,
)
from megatron_mm.hf.weight_map import Target
from megatron_mm.model.shapes import compare_shapes, tensor_shapes
from megatron_mm.outside import checked, file_name, load_json, read_json
from megatron_mm.settings import divisors
from megatron_mm.storage import (
    PARTIAL,
    hash_file,
    make_folder,
    publish_folder,
    remove_file,
    replacing,
    require_space,
)
from megatron_mm.tokenizer import TextTokenizer

log = logging.getLogger(__name__)

STOCK = tuple(name for name, exports in files.EXPORTS.items() if exports.stock)
KINDS = ("text", *STOCK, "full")
"""Exports: a stock decoder; text and one modality in a stock class; everything, with a little own code."""
PARTS = {"text": ("text",), **{name: ("language", name) for name in STOCK}, "full": ("language", *files.EXPORTS)}
"""Which parts make up an export; a part that two of them have is one file on the disk."""
MANIFEST = files.MANIFEST


@dataclass(frozen=True)
class Options:
    """What is written."""

    kinds: tuple[str, ...] | None = None
    """None: every one that can have the run's encoders."""
    dtype: torch.dtype | None = None
    """None keeps the type of the training weights."""
    kv_replicate: int = 1
    """Times that each key/value head is written."""
    shard_bytes: int = 5_000_000_000
    """The most bytes of one safetensors file."""


@dataclass(frozen=True)
class _Job:
    """One export: what it is made of, and which files it becomes."""

    source: CheckpointReader
    config: Config
    tokenizer: TextTokenizer
    options: Options
    shards: tuple[Shard, ...]
    links: dict[str, str]
    """Paths that are hard links, and to what."""

    def shards_of(self, kind: str) -> dict[str, tuple[Shard, str]]:
        """Return (shard, path that it is written to) of each file of an export, in order."""
        by_path = {shard.path: shard for shard in self.shards}
        written = dict(zip(by_path, by_path)) | self.links
        own = sorted(path for path in written if path.startswith(f"{kind}/"))
        return {path.removeprefix(f"{kind}/"): (by_path[written[path]], written[path]) for path in own}


def export(
    checkpoint: Path,
    out: Path,
    *,
    tokenizer_path: Path | None = None,
    options: Options = Options(),
    gate: Callable[[Path], dict[str, str]] | None = None,
    check: bool = True,
) -> None:
    """Write the exports of a checkpoint to OUT/KIND, a folder for each kind, as `options` has it.

    The checkpoint's files are hashed first, unless `check` is false. The tokenizer is its own, or the named one. `gate`
    is given each folder that has all but its model card and manifest: it raises if the export is wrong, or returns
    figures for the card.
    Streams blocks of rows from the checkpoint's files, needs neither GPU nor process group, and holds no tensor whole.
    All is written to OUT.partial, read back, and renamed when it is right; the same command goes on behind the shards
    of one that was interrupted. Raises DataError for a damaged or foreign checkpoint and a full disk.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: name a folder that does not, or remove it.")
    job = _prepare(checkpoint, tokenizer_path, options)
    if check:
        check_source(checkpoint)
    options = job.options
    partial = out.with_name(out.name + PARTIAL)
    begun = _fingerprint(checkpoint, job.tokenizer, options)
    done = _begin(partial, begun)
    for kind in options.kinds:
        (partial / kind).mkdir(exist_ok=True)
    require_space(partial, sum(shard.num_bytes for shard in job.shards if shard.path not in done))
    total = sum(shard.num_bytes for shard in job.shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="export") as progress:
        for shard in job.shards:
            if shard.path in done and (partial / shard.path).exists():
                check_sha256(partial / shard.path, done[shard.path])
                progress.update(shard.num_bytes)
                continue
            done[shard.path] = write_shard(partial, shard, job.source, progress=progress)
            try:
                with replacing(partial / "progress.json") as file:
                    file.write(json.dumps({"begun": begun, "done": done}).encode())
            except OSError as error:
                raise explained(error, partial, 0) from error
    for link, path in job.links.items():
        (partial / link).unlink(missing_ok=True)
        os.link(partial / path, partial / link)
    try:
        for kind in options.kinds:
            _finish(partial / kind, kind, job, done, gate)
    except OSError as error:
        raise explained(error, partial, 0) from error
    publish_folder(partial, out)
    remove_file(out / "progress.json")


def _prepare(checkpoint: Path, tokenizer_path: Path | None, options: Options) -> _Job:
    if checkpoint.name.endswith(PARTIAL):
        raise DataError(f"{checkpoint} is half written: use the newest step_N folder beside it.")
    source = CheckpointReader(checkpoint)
    config = configs.load_saved(checkpoint / "config.yaml")
    if tokenizer_path is None and not (checkpoint / "tokenizer.json").exists():
        raise ConfigError(f"{checkpoint} has no tokenizer.json: name that of the run's shards with --tokenizer.")
    tokenizer = TextTokenizer(tokenizer_path or checkpoint / "tokenizer.json")
    options = replace(options, kinds=_kinds(config, options.kinds))
    _check_settings(config, tokenizer, options)
    _check_shapes(source, config)
    shards, links = _plan(source, config, options)
    return _Job(source, config, tokenizer, options, tuple(shards), links)


def _kinds(config: Config, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the exports to write. Raises ConfigError if one is asked for whose class cannot have the run's encoder."""
    refused = {}
    for name in STOCK:
        reason = files.EXPORTS[name].stock.refusal(config.encoders[name])
        if reason:
            refused[name] = f"{reason}; --full carries it"
    for name in refused.keys() & set(asked or ()):
        raise ConfigError(f"--{name} cannot be written: {refused[name]}.")
    if asked is None:
        for name, reason in refused.items():
            log.warning("%s is left out: %s", name, reason)
    return asked or tuple(kind for kind in KINDS if kind not in refused)


class Sums(TypedDict):
    """What the manifest of an export must say."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    sha256: dict[str, str]


class Progress(TypedDict):
    """What an export that is under way has done."""

    begun: str
    done: dict[str, str]


def verify_if_listed(folder: Path) -> None:
    """Pass if an export is as it was written, and say so if the folder, as one of others, cannot tell.

    Its model card may be another: who publishes it adds to it. Raises DataError as `verify`.
    """
    if (folder / MANIFEST).exists():
        verify(folder, without=(files.CARD,))
    else:
        log.warning("%s has no %s: whether its files are as they were written cannot be told", folder, MANIFEST)


def verify(folder: Path, *, without: Collection[str] = ()) -> int:
    """Pass if every file of an export, but those `without`, is as it was written, and return how many there are.

    Raises DataError if not.
    """
    try:
        sums = checked(load_json((folder / MANIFEST).read_bytes()), Sums, where="it")["sha256"]
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not a finished export: {MANIFEST} cannot be read ({error}).") from error
    sums = {name: expected for name, expected in sums.items() if name not in without}
    for name, expected in tqdm(sums.items(), desc="verify", unit="file"):
        check_sha256(folder / file_name(name, where=folder / MANIFEST), expected)
    return len(sums)


def _check_settings(config: Config, tokenizer: TextTokenizer, options: Options) -> None:
    heads, groups, times = config.model.num_attention_heads, config.model.num_query_groups, options.kv_replicate
    if heads % (groups * times):
        fitting = divisors(heads // groups)
        raise ConfigError(
            f"--kv-replicate {times} x {groups} groups does not divide {heads} heads. Use one of {fitting}."
        )
    if tokenizer.info.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{tokenizer.path} has {tokenizer.info.vocab_size} ids, the model {config.model.vocab_size}: it is not the "
            "tokenizer that the shards were made with."
        )


def _check_shapes(source: CheckpointReader, config: Config) -> None:
    """Raise DataError if the checkpoint is not the model of its config.yaml, apart from a modality that it has not."""
    found = {name: info.shape for name, info in source.tensors.items()}
    lacking = tuple(f"embedding.{name}." for name in files.EXPORTS)
    lacking = tuple(part for part in lacking if not any(name.startswith(part) for name in found))
    expected = {name: shape for name, shape in tensor_shapes(config).items() if not name.startswith(lacking)}
    wrong = compare_shapes(found, expected)
    if wrong:
        raise DataError(f"{source.path} is not the model of its config.yaml:\n  " + "\n  ".join(wrong))


def targets_of(part: str, source: CheckpointReader, config: Config, *, kv_replicate: int = 1) -> list[Target]:
    """Return the tensors of one part of an export."""
    if part in ("text", "language"):
        prefix = "model." if part == "text" else "model.language_model."
        return list(weight_map.decoder(config.model, prefix=prefix, kv_replicate=kv_replicate))
    rows = {name: info.shape[0] for name, info in source.tensors.items()}
    return list(files.media_map(part, config).targets(rows))


def _plan(source: CheckpointReader, config: Config, options: Options) -> tuple[list[Shard], dict[str, str]]:
    """Return the shards to write, and the paths that are hard links to others."""
    there = ["text", "language"]
    there += [part for part in files.EXPORTS if any(name.startswith(f"embedding.{part}.") for name in source.tensors)]
    for kind in options.kinds:
        lacking = [part for part in PARTS[kind] if part not in there]
        if lacking:
            raise ConfigError(f"{source.path} has no {' and no '.join(lacking)} encoder: export it with --text alone.")
    resolved: dict[str, list[tuple[Target, TensorInfo]]] = {}
    for part in there:
        targets = targets_of(part, source, config, kv_replicate=options.kv_replicate)
        resolved[part] = [(target, info_of(target, source, dtype=options.dtype)) for target in targets]
    targets = [target for part in resolved.values() for target, _ in part]
    kept = [name for part in files.EXPORTS for name in files.media_map(part, config).kept]
    check_complete(source, targets, where=str(source.path), without=kept)
    packed = {part: pack(tensors, shard_bytes=options.shard_bytes) for part, tensors in resolved.items()}
    shards: list[Shard] = []
    links: dict[str, str] = {}
    written: dict[tuple[str, int], str] = {}
    for kind in sorted(options.kinds, key=KINDS.index, reverse=True):
        pieces = [(part, number) for part in PARTS[kind] for number in range(len(packed[part]))]
        for position, piece in enumerate(pieces, start=1):
            path = f"{kind}/model-{position:05d}-of-{len(pieces):05d}.safetensors"
            if piece in written:
                links[path] = written[piece]
            else:
                written[piece] = path
                shards.append(Shard(path, packed[piece[0]][piece[1]]))
    return shards, links


def _fingerprint(checkpoint: Path, tokenizer: TextTokenizer, options: Options) -> str:
    """Return what two exports must share for one to go on with the other's shards."""
    digest = hashlib.sha256(repr((options, tokenizer.info.sha256)).encode())
    for name in ("manifest.json", "config.yaml", ".metadata"):
        digest.update((checkpoint / name).read_bytes())
    return digest.hexdigest()


def _begin(partial: Path, begun: str) -> dict[str, str]:
    """Return the shards that an interrupted export has left whole, by path, with their sha256."""
    make_folder(partial)
    progress = partial / "progress.json"
    if not progress.exists():
        if any(file.is_file() for file in partial.rglob("*.safetensors")):
            raise ConfigError(f"{partial} holds shards that are not accounted for: remove it.")
        return {}
    found = read_json(progress, Progress, hint=f"Remove {partial}.")
    if found["begun"] != begun:
        raise ConfigError(f"{partial} was begun from another checkpoint, or with other options: remove it.")
    return found["done"]


def _finish(
    folder: Path, kind: str, job: _Job, done: dict[str, str], gate: Callable[[Path], dict[str, str]] | None
) -> None:
    """Write the files around the shards of one export, the manifest last."""
    shards = job.shards_of(kind)
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(shard.num_bytes for shard, _ in shards.values())},
        "weight_map": {target.name: name for name, (shard, _) in shards.items() for target, _ in shard.tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    trained = job.source.tensors["output_layer.weight"].dtype
    dtype, times = job.options.dtype or trained, job.options.kv_replicate
    files.write_files(folder, kind=kind, config=job.config, tokenizer=job.tokenizer, dtype=dtype, kv_replicate=times)
    figures = {
        "tensors, each made of rows of the training checkpoint": len(index["weight_map"]),
        "shards read back after writing, sha256 equal": len(shards),
        "weights": f"{dtype} (trained in {trained})".replace("torch.", ""),
    }
    figures |= gate(folder) if gate is not None else {}
    card = files.model_card(job.config, kind=kind, step=job.source.step, figures=figures)
    (folder / files.CARD).write_text(card)
    sums = {name: done[path] for name, (_, path) in shards.items()}
    others = sorted(file for file in folder.iterdir() if file.name not in sums and file.name != MANIFEST)
    sums |= {file.name: hash_file(file, keep_cached=False) for file in others}
    manifest = {"kind": kind, "checkpoint": job.source.path.name, "step": job.source.step, "options": repr(job.options)}
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(manifest | {"sha256": sums}, indent=1).encode())
