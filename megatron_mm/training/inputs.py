"""What a run depends on beside its settings, by content: names and paths stand for it, and contents behind them change.

Recorded with every checkpoint, compared between ranks at the start and with the checkpoint at a resume.
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict

from pydantic import ConfigDict

from megatron_mm.checkpoint.format import MANIFEST, TOKENIZER
from megatron_mm.checkpoint.verify import fingerprint
from megatron_mm.config import Config, anchor_prefix, flat
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.modalities import BY_NAME
from megatron_mm.modalities.pretrained import find_weights
from megatron_mm.outside import checked
from megatron_mm.retry import retrying
from megatron_mm.shards import ShardReader, fingerprints, stored_tokenizer
from megatron_mm.storage import hash_file

log = logging.getLogger(__name__)

FILES = ("training.start_from", *(f"{name}.pretrained" for name in BY_NAME))
"""Settings that name what a new run's weights come from."""
GONE = "gone"
"""Stands for a file that is not there any more: a resumed run does not read it."""
READ_BYTES = 64 << 20
"""How many bytes of shards a rank compares with their checksums at a start."""
SHORT = 12
"""Digits of a hash that messages show."""


class Recorded(TypedDict):
    """What the manifest of a checkpoint says of the inputs of its run."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    datasets: dict[str, list[str]]
    validation: dict[str, list[str]]
    tokenizer: str
    files: dict[str, str]


class AddedToken(TypedDict):
    """What tokenizer.json says of a token beside its vocabulary."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    id: int
    content: str


class TokenizerFile(TypedDict):
    """What of a tokenizer.json tells whether it extends another."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    added_tokens: NotRequired[list[AddedToken] | None]


@dataclass(frozen=True)
class Inputs:
    """The contents that a run was given."""

    datasets: dict[str, list[str]]
    """Fingerprints of the shards of each dataset in data.train and data.changes, by its name."""
    validation: dict[str, list[str]]
    """Fingerprints of the held-out shards of each prefix."""
    tokenizer: str
    """SHA-256 of the tokenizer.json that the ids come from."""
    files: dict[str, str]
    """Hash of what each setting of FILES names; 'random' or 'none' as they say, GONE if it is not there."""

    @classmethod
    def of(cls, facts: Mapping[str, Any] | None) -> Self | None:
        """Return the inputs that a checkpoint's manifest records, None if it is older than this record."""
        return None if facts is None else cls(**checked(facts, Recorded, where="the record of a checkpoint's inputs"))

    def as_json(self) -> dict[str, Any]:
        """Return what a manifest records: with absolute names, as the config.yaml beside it has them."""
        datasets, validation = (
            {anchor_prefix(name): prints for name, prints in named.items()}
            for named in (self.datasets, self.validation)
        )
        return {**asdict(self), "datasets": datasets, "validation": validation}

    def by_name(self) -> dict[str, str]:
        """Return every content as text by what it is, to be compared between ranks."""
        found = {"tokenizer": self.tokenizer[:SHORT], **{key: _short(value) for key, value in self.files.items()}}
        found |= {f"data.train {name}": _short_all(prints) for name, prints in self.datasets.items()}
        return found | {f"data.validation {name}": _short_all(prints) for name, prints in self.validation.items()}


def read_inputs(config: Config, tokenizer: str, *, hash_files: bool) -> Inputs:
    """Return what `config` names, as it lies on the disk. `tokenizer` is the hash that the shards record.

    Files of weights, a gigabyte or two, are read only with `hash_files`. Raises DataError if shards are missing.
    """
    datasets = {
        name: [own for prefix in name.split(",") for _, own in fingerprints(prefix)]
        for name in config.data.train_datasets
    }
    validation = {prefix: [own for _, own in fingerprints(prefix)] for prefix in config.data.validation_datasets}
    named = {
        "training.start_from": config.training.start_from,
        **{f"{name}.pretrained": own.pretrained for name, own in config.encoders.items()},
    }
    files = {key: _hash(value) for key, value in named.items()} if hash_files else {}
    return Inputs(datasets, validation, tokenizer, files)


def _hash(value: str | None) -> str:
    """Return the hash of a file of weights, of the one in a Hugging Face folder, or of a checkpoint."""
    if value is None or value == "random":
        return value or "none"
    path = Path(value)
    if not path.exists():
        return GONE
    if (path / MANIFEST).exists():
        return fingerprint(path)
    file = find_weights(path)
    return retrying(lambda: hash_file(file), what=file)


def check_held_out(config: Config) -> None:
    """Pass if nothing is trained on twice, held out twice, or both: shards count by content, however they are named.

    Raises ConfigError with both names of the shards that are.
    """
    trained: dict[str, str] = {}
    problems = []
    for prefix in [prefix for name in config.data.train_datasets for prefix in name.split(",")]:
        for part, own in fingerprints(prefix):
            if own in trained:
                problems.append(f"data.train holds the same shards twice, {_named(trained[own], part)}")
            trained[own] = part
    held_out: dict[str, str] = {}
    for prefix in config.data.validation_datasets:
        for part, own in fingerprints(prefix):
            if own in held_out:
                problems.append(f"data.validation holds the same shards twice, {_named(held_out[own], part)}")
            held_out[own] = part
            if own in trained:
                problems.append(
                    f"data.validation={prefix} is trained on: {_named(trained[own], part)} of data.train holds the "
                    "same documents"
                )
    if problems:
        raise ConfigError(
            ";\n  ".join(problems) + ".\n  Take one of the two out: held-out documents must not be trained on, and no "
            "document count twice in silence."
        )


def _named(first: str, second: str) -> str:
    return first if first == second else f"{first} (also {second})"


def check_same_inputs(saved: Inputs, now: Inputs, *, configs: tuple[Config, Config], step: int) -> list[str]:
    """Return what has changed, of what may, since a checkpoint of step `step` was saved, a line each.

    `configs` are the settings then and now. Raises ConfigError with every content that a resumed run cannot change,
    under its name then and its name now.
    """
    refused, changed = [], []
    if saved.tokenizer != now.tokenizer:
        refused.append(
            f"the shards come from tokenizer {now.tokenizer[:SHORT]}, the run's from {saved.tokenizer[:SHORT]}"
        )
    refused += list(_other_datasets(saved, now, configs=configs, step=step))
    held_out = {anchor_prefix(prefix): prints for prefix, prints in saved.validation.items()}
    for prefix, prints in now.validation.items():
        before = held_out.get(anchor_prefix(prefix))
        if before is None:
            changed.append(f"data.validation: {prefix} is held out since step {step}")
        elif before != prints:
            refused.append(
                f"data.validation: {prefix} holds {_short_all(prints)}, and held {_short_all(before)} when the run was "
                "saved"
            )
    for key, found in now.files.items():
        then, own = saved.files.get(key, "none"), flat(configs[1])[key]
        if found not in (then, GONE, "none"):
            refused.append(
                f"{key}={own} is {_short(found)}, and the run started from {flat(configs[0])[key]} ({_short(then)}): "
                "a resumed run does not read it again"
            )
    if refused:
        raise ConfigError(
            "what this run was trained on is not what its settings name now:\n  "
            + "\n  ".join(refused)
            + "\n  Put back "
            "what was there (paths may move), or start anew: another run_dir, with training.start_from for the weights."
        )
    return changed


def _other_datasets(saved: Inputs, now: Inputs, *, configs: tuple[Config, Config], step: int) -> Iterator[str]:
    """Yield which datasets, of those that steps up to `step` drew from, are not what was trained on.

    Their number and weights are compared with the settings.
    """
    before, after = (_drawn(config, inputs, step) for config, inputs in zip(configs, (saved, now)))
    for (what, then), (_, found) in zip(before, after, strict=True):
        if list(then.values()) != list(found.values()):
            own, theirs = (
                ", ".join(f"{name} ({_short_all(prints)})" for name, prints in datasets.items())
                for datasets in (found, then)
            )
            yield f"{what} is {own}; the run was trained on {theirs}"


def _drawn(config: Config, inputs: Inputs, step: int) -> list[tuple[str, dict[str, list[str]]]]:
    """Return, of data.train and of each past change, the fingerprints of every dataset, in order."""
    train = config.data.train
    named = {"data.train": list(train) if isinstance(train, dict) else [",".join(train)]}
    past = [change for change in config.data.changes if change.from_step < step]
    named |= {f"data.changes from step {change.from_step}": list(change.train) for change in past}
    return [(what, {name: inputs.datasets[name] for name in names}) for what, names in named.items()]


def check_tokenizers(trained: ShardReader, held_out: ShardReader | None, *, is_rank_0: bool) -> None:
    """Pass if shards that are trained on and held-out ones speak of the same ids, and the tokenizer is that of the ids.

    Rank 0 says what is missing. Raises ConfigError that names both sides, DataError if the tokenizer.json
    beside the shards is not the one that they were made with.
    """
    if stored_tokenizer(trained.prefix) is None and is_rank_0:
        log.warning("%s has no %s beside it: checkpoints and exports will have no tokenizer", trained.prefix, TOKENIZER)
    if held_out is not None and held_out.tokenizer != trained.tokenizer:
        raise ConfigError(
            f"data.validation={held_out.prefix} comes from another tokenizer than {trained.prefix} of data.train: the "
            "same id means different text. Preprocess it again with the tokenizer of the training data."
        )


def check_stored_tokenizer(path: Path, shards: ShardReader, *, what: str, is_rank_0: bool) -> None:
    """Pass if the ids of `shards` mean what those of the checkpoint `path` do; rank 0 says where it cannot tell.

    Raises ConfigError that names both tokenizers; `what` is the setting that is wrong then.
    """
    stored, content = path / TOKENIZER, stored_tokenizer(shards.prefix)
    if (not stored.exists() or content is None) and is_rank_0:
        lacking = path if content is not None else shards.prefix
        log.warning(
            "whether ids mean the same in %s and %s cannot be told: %s has no tokenizer", path, shards.prefix, lacking
        )
    if (
        stored.exists()
        and content is not None
        and not _extends(_tokenizer_of(content, shards.prefix), _tokenizer_of(stored.read_bytes(), str(stored)))
    ):
        raise ConfigError(
            f"{what}: {path} was trained with another tokenizer ({hash_file(stored)[:SHORT]}) than the shards "
            f"{shards.prefix} come from ({shards.tokenizer.sha256[:SHORT]}): the same id means other text. Preprocess "
            f"the data with {stored}."
        )


def check_bytes(shards: Sequence[ShardReader], *, share: int, of: int) -> None:
    """Pass if files of the shards hold what their manifests say: each of `of` ranks reads READ_BYTES of its share.

    All of a small set are read at every start, and of a large one other blocks each time. Raises DataError, but for
    media, which are compared item by item as they are read: what is damaged is left blank, and named here.
    """
    blocks = [(shard, *block) for shard in shards for block in shard.blocks][share::of]
    random.shuffle(blocks)
    left = READ_BYTES
    for shard, suffix, block, num_bytes in blocks:
        if left <= 0:
            break
        try:
            shard.check_block(suffix, block)
        except DataError as error:
            if suffix != ".media.bin":
                raise
            log.warning("%s Until then, its damaged items are left blank.", error)
        left -= num_bytes


def _tokenizer_of(content: bytes, where: str) -> Mapping[str, Any]:
    """Return what a tokenizer.json says. Raises DataError if it is none."""
    try:
        return checked(json.loads(content), TokenizerFile, where=f"the tokenizer.json of {where}")
    except (ValueError, RecursionError) as error:
        raise DataError(f"the tokenizer.json of {where} is damaged ({error}). Restore it.") from error


def _extends(tokenizer: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer.json is `base`, or `base` with more added tokens."""
    parts = ("model", "normalizer", "pre_tokenizer")
    ids = {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or []}
    same = all(ids.get(token["id"]) == token["content"] for token in base.get("added_tokens") or [])
    return same and all(tokenizer.get(part) == base.get(part) for part in parts)


def _short(value: str) -> str:
    return value[:SHORT]


def _short_all(prints: list[str]) -> str:
    """Return one short name for the shards of a dataset."""
    return _short(prints[0] if len(prints) == 1 else hashlib.sha256("".join(prints).encode()).hexdigest())
