"""From a preset and overrides to a checked `Config`, and back to YAML."""

import contextlib
import copy
import difflib
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megatron_mm import optimizers
from megatron_mm.config import rules
from megatron_mm.config.schema import Config, OptimizerConfig
from megatron_mm.errors import ConfigError
from megatron_mm.modalities import BY_NAME, MODALITIES, RANDOM, Geometry
from megatron_mm.retry import retrying
from megatron_mm.storage import make_folder, replacing

log = logging.getLogger(__name__)

NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What PyYAML raises of text that is not YAML, or has values that are not of their types: dates, numbers, tags."""

PRESET_DIR = Path(__file__).parent / "presets"
RENAMED = {"vision": "image"}
"""Sections as files of earlier versions name them, and as they are called now."""
SHOWN_CHARACTERS = 80
"""How much of a value that cannot be is shown in a message."""


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package."""
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


def load(preset: str, overrides: Sequence[str] = ()) -> Config:
    """Return the checked configuration of `preset` with `section.key=value` overrides applied.

    `preset` is a name from `preset_names()` or the path of a YAML file, such as the config.yaml of an earlier run. A
    file may start from another preset with `extends: PRESET`: a name, or a path that is looked up beside the file.
    Raises ConfigError with every unknown key, ill-typed value and broken rule at once.
    """
    config, problems = _build(preset, overrides)
    problems += rules.failures(config) if config is not None else []
    if config is None or problems:
        raise ConfigError("\n  ".join(problems))
    return config


def load_saved(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration in a config.yaml that a run has saved: it ran, so today's rules are not held against it.

    Raises ConfigError if it cannot be read, or has settings that this version does not know.
    """
    config, problems = _build(str(path), overrides)
    if config is None or problems:
        raise ConfigError(f"{path}:\n  " + "\n  ".join(problems))
    return config


def geometries(config: Config) -> dict[str, Geometry]:
    """Return how media become tokens in `config`, by modality, without the other settings of their encoders."""
    return {own.name: own.geometry(**own.fingerprint(getattr(config, own.name))) for own in MODALITIES}


def _build(preset: str, overrides: Sequence[str]) -> tuple[Config | None, list[str]]:
    """Return the configuration, None if it cannot be built, and what is wrong with its keys and values."""
    settings = _read(preset)
    problems = _apply(settings, overrides)
    problems += _take_out_unknown(settings)
    try:
        return Config(**{"preset": preset, **{name: {} for name in BY_NAME}, **settings}), problems
    except ValidationError as error:
        problems += [line for detail in error.errors() if (line := _explain_value(detail, settings))]
    return None, problems


SHAPES = {
    "tuple_type": "Write a list, [first, second]",
    "dict_type": "Write pairs, {name: value}",
    "model_type": "It is a section: write {key: value} in a file, or section.key=value",
}
"""What to do, by pydantic's name of a mistake, where pydantic's own words are about Python."""


def _explain_value(detail: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a value, by its key; None of a form that the value was not meant to have.

    Where a list or pairs may stand, pydantic reports both: pairs are held against pairs, and all else against a list.
    """
    key, value, pairs = [], settings, False
    for part in detail["loc"]:
        if isinstance(part, str) and part.startswith(("tuple[", "dict[")):
            pairs = isinstance(value, dict)
            if part.startswith("dict[") != pairs:
                return None
            continue
        key.append(str(part))
        with contextlib.suppress(KeyError, IndexError, TypeError):
            value = value[part]
    if detail["type"] == "missing":
        return f"{'.'.join(key)} is missing, and has no default. Give it."
    found = repr(detail["input"])
    found = found if len(found) <= SHOWN_CHARACTERS else found[:SHOWN_CHARACTERS] + "..."
    return f"{'.'.join(key)}: {SHAPES.get(detail['type'], detail['msg'])} (found {found})"


def to_yaml(config: Config) -> str:
    """Return `config` as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def save(config: Config) -> Path:
    """Write `config`, with absolute paths, to config.yaml in its run_dir, and return the file."""
    path = Path(config.run_dir) / "config.yaml"
    make_folder(path.parent)
    with replacing(path) as file:
        file.write(to_yaml(anchor(config)).encode())
    return path


def anchor(config: Config) -> Config:
    """Return `config` with absolute paths: what a run saves of itself means the same in whatever folder it is read."""

    def blend(train: Mapping[str, float]) -> dict[str, float]:
        return {anchor_prefix(name): weight for name, weight in train.items()}

    data, train = config.data, config.data.train
    changed: dict[str, Any] = {
        "train": blend(train) if isinstance(train, Mapping) else tuple(anchor_prefix(name) for name in train),
        "changes": tuple(change.model_copy(update={"train": blend(change.train)}) for change in data.changes),
        "validation": tuple(anchor_prefix(name) for name in data.validation),
    }
    files = {
        section: {key: value if value in (None, RANDOM) else os.path.abspath(value)}
        for section, key in (("training", "start_from"), *((name, "pretrained") for name in BY_NAME))
        for value in [getattr(getattr(config, section), key)]
    }
    sections = {name: getattr(config, name).model_copy(update=own) for name, own in (("data", changed), *files.items())}
    preset = os.path.abspath(config.preset) if Path(config.preset).is_file() else config.preset
    return config.model_copy(update={**sections, "run_dir": os.path.abspath(config.run_dir), "preset": preset})


def anchor_prefix(name: str) -> str:
    """Return the absolute prefix of shards, or prefixes if commas join several."""
    return ",".join(os.path.abspath(prefix) for prefix in name.split(","))


def check_own_run(preset: str, config: Config) -> None:
    """Pass unless `preset` is the config.yaml of a run that was moved, and `config` would start another in its stead.

    Raises ConfigError with both folders.
    """
    file, run_dir = Path(preset).absolute(), Path(config.run_dir).absolute()
    folder = file.parent.parent.parent if file.parent.parent.name == "checkpoints" else file.parent
    saved = any((folder / "checkpoints").glob("step_*/COMMITTED"))
    goes_on = run_dir.resolve() == folder.resolve() or any((run_dir / "checkpoints").glob("step_*/COMMITTED"))
    if file.is_file() and file.name == "config.yaml" and saved and not goes_on:
        then = _build(preset, ())[0]
        if then is not None and Path(then.run_dir).absolute() == run_dir:
            raise ConfigError(
                f"{preset} lies in the run {folder}, but names run_dir={config.run_dir}, where there is no checkpoint: "
                f"the folder was moved or copied. Give run_dir={folder} to go on with the run, or the run_dir of a new "
                "one."
            )


def differences(before: Config, after: Config) -> dict[str, str]:
    """Return a line 'section.key: value before -> value after' for every setting that differs, by its key."""
    old, new = flat(before), flat(after)
    keys = {
        key: (old.get(key, "none"), new.get(key, "none")) for key in (*new, *(key for key in old if key not in new))
    }
    return {key: f"{key}: {was} -> {now}" for key, (was, now) in keys.items() if was != now}


def changes(config: Config) -> list[str]:
    """Return how `config` differs from its preset, one line a setting.

    A run goes on without the file that it was started from, so a preset that has moved, or no longer loads, is said to
    be gone and not compared.
    """
    try:
        preset, _ = _build(config.preset, ())
    except ConfigError:
        preset = None
    if preset is None:
        return ["the file of this preset is gone, or was changed so that it does not load: nothing to compare with"]
    return list(differences(preset, config).values())


def describe_fields() -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, type, default, explanation) of every setting, in the order of the schema."""
    for path, info in _fields(Config):
        kind = getattr(info.annotation, "__name__", None) if not get_args(info.annotation) else None
        kind = kind or str(info.annotation).replace("typing.", "")
        default = "required" if info.is_required() else repr(info.default)
        yield path, kind, default, " ".join((info.description or "").split())


def _read(preset: str, *, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the settings of a preset, with those that it extends; `extended_by` are the files that led here."""
    path = _find(preset, extended_by=extended_by[-1] if extended_by else None)
    if path in extended_by:
        loop = " extends ".join(str(one) for one in (*extended_by[extended_by.index(path) :], path))
        raise ConfigError(f"{loop}: a preset cannot extend itself. Take one `extends` out.")
    try:
        settings = yaml.load(retrying(path.read_text, what=path), _OnceOnly)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""
        raise ConfigError(
            f"{path}{place} cannot be read as YAML: {error.problem}. Mend it there, or a little before."
        ) from error
    except NOT_YAML as error:
        raise ConfigError(f"{path} is not YAML ({type(error).__name__}: {error}). Give a text file.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a file that can.") from error
    if not isinstance(settings, dict):
        what = "is empty" if settings is None else f"holds a {type(settings).__name__}, not sections of settings"
        raise ConfigError(f"{path} {what}. Write `extends: PRESET` and, below it, `section: {{key: value}}`.")
    for before, now in RENAMED.items():
        if before in settings and now not in settings:
            _say_renamed(path, before, now)
            settings = {now if name == before else name: value for name, value in settings.items()}
    base = settings.pop("extends", None)
    if base is None:
        return settings
    if (path.parent / "manifest.json").exists():
        raise ConfigError(f"{path} extends {base!r}: the settings of a checkpoint stand alone. Restore the file.")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends is {base!r}. Write the name of one preset, or the path of one file.")
    return _merged(_read(base, extended_by=(*extended_by, path)), settings)


@functools.cache
def _say_renamed(path: Path, before: str, now: str) -> None:
    """Say once of each file that a section of it has another name by now."""
    log.info("%s: the section %s is now called %s, and is read as it", path, before, now)


class _OnceOnly(yaml.SafeLoader):
    """Reads YAML, and refuses a key that stands twice in a section, where YAML would keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node."""
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _find(preset: str, *, extended_by: Path | None) -> Path:
    """Return the file of a preset: one of the package's, one beside the file that extends it, or a path."""
    beside = [extended_by.parent / preset] if extended_by else []
    candidates = [PRESET_DIR / f"{preset}.yaml", *beside, Path(preset)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        who = f"{extended_by} extends {preset!r}, but no" if extended_by else "no"
        raise ConfigError(
            f"{who} preset and no file is called {preset!r}: the presets are {preset_names()}.{_hint(preset)}"
        )
    return found.resolve()


def _hint(preset: str) -> str:
    """Return what may have been meant by the name of a preset that is none, as a sentence."""
    path = Path(preset)
    if (path / "config.yaml").is_file():
        return f" {preset} is a run_dir: did you mean {path / 'config.yaml'}?"
    if path.is_dir():
        return f" {preset} is a folder: give a file."
    if preset.startswith("~") or "$" in preset:
        return " ~ and $ are expanded by the shell, and only without quotes."
    files = [str(file) for file in path.parent.glob("*.y*ml")] if path.suffix else []
    near = difflib.get_close_matches(preset, [*preset_names(), *files], n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def _merged(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with what `settings` says on top, section by section."""
    merged = dict(base)
    for name, value in settings.items():
        own = merged.get(name)
        merged[name] = {**own, **value} if isinstance(own, dict) and isinstance(value, dict) else value
    return merged


def _apply(settings: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write each override into `settings`; return what could not be read."""
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(f"{override!r} is not an override: write section.key=value.")
            continue
        try:
            value = yaml.safe_load(text)
        except NOT_YAML:
            problems.append(f"{override!r}: the value is not YAML; quote it.")
            continue
        if isinstance(value, str) and _is_number(value):  # YAML 1.1 reads 2e-4 as a string
            value = float(value)
        section = settings
        *parents, leaf = key.split(".")
        for parent in parents:
            if not isinstance(section.setdefault(parent, {}), dict):
                break
            section = section[parent]
        else:
            section[leaf] = value
            continue
        problems.append(_unknown(key))
    return problems


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _fields(model: type[BaseModel] | BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, field) of every setting: those of a configuration, or of a class all that one may have."""
    kind = model if isinstance(model, type) else type(model)
    for name, info in kind.model_fields.items():
        inner = info.annotation if isinstance(model, type) else getattr(model, name)
        if inner is OptimizerConfig:
            yield from _optimizer_fields()
        elif isinstance(inner, BaseModel) or (isinstance(inner, type) and issubclass(inner, BaseModel)):
            yield from _fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def _optimizer_fields() -> Iterator[tuple[str, Any]]:
    """Yield (key, field) of the settings that all optimizers share, then of those that each has of its own."""
    yield from _fields(OptimizerConfig, "optimizer.")
    for name in optimizers.names():
        for key, info in optimizers.find(name).model_fields.items():
            if key not in OptimizerConfig.model_fields:
                own = copy.copy(info)
                own.description = f"With optimizer.name={name}: {info.description}"
                yield f"optimizer.{key}", own


def _unknown(key: str) -> str:
    section, dot, rest = key.partition(".")
    if section in RENAMED:
        now = f"{RENAMED[section]}{dot}{rest}"
        return f"{key} is not a setting: the section {section} is now called {RENAMED[section]}. Write {now}."
    known = list(dict(_fields(Config))) if "." in key else list(Config.model_fields)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5 if "." in key else 0.7)
    known = list(dict(_fields(Config)))
    same_leaf = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    hint = (near or same_leaf)[:1]
    return f"{key} is not a setting." + (f" Did you mean {hint[0]}?" if hint else " See --help for all of them.")


def _take_out_unknown(settings: dict[str, Any]) -> list[str]:
    """Remove what the schema does not know, so that the rules still see the rest; return a message for each."""
    problems = []
    for name, value in list(settings.items()):
        field = Config.model_fields.get(name)
        if field is None:
            problems.append(_unknown(str(name)))
            del settings[name]
        elif field.annotation is OptimizerConfig and isinstance(value, dict):
            problems += _take_out_unknown_of_optimizer(settings)
        elif isinstance(value, dict):
            for inner in [inner for inner in value if inner not in field.annotation.model_fields]:
                problems.append(_unknown(f"{name}.{inner}"))
                del value[inner]
    return problems


def _take_out_unknown_of_optimizer(settings: dict[str, Any]) -> list[str]:
    """Do the same in the section `optimizer`, all of which goes if nobody knows the optimizer."""
    section, problems = settings["optimizer"], []
    chosen = section.get("name", optimizers.DEFAULT)
    try:
        known = optimizers.find(chosen).model_fields
    except ConfigError as error:
        del settings["optimizer"]
        return [str(error)]
    for inner in [inner for inner in section if inner not in known]:
        others = [name for name in optimizers.names() if inner in optimizers.find(name).model_fields]
        of_another = (
            f"optimizer.{inner} is a setting of optimizer.name={' and '.join(others)}, not of {chosen}. Take it out, "
            "or choose the optimizer that has it."
        )
        problems.append(of_another if others else _unknown(f"optimizer.{inner}"))
        del section[inner]
    return problems


def flat(config: Config) -> dict[str, Any]:
    """Return every setting by its key, 'section.key', as plain values."""
    dump = config.model_dump(mode="json")
    values = {}
    for path, _ in _fields(config):
        value: Any = dump
        for part in path.split("."):
            value = value[part]
        values[path] = value
    return values
