"""JSON that somebody else may have written: of the types that its reader asks for, or an error by file and field."""

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from megatron_mm.errors import DataError

NAMED = 4
"""Wrong fields that a message names."""
SHOWN = 40
"""Characters of a wrong value that a message shows."""


def read_json[T](path: Path, kind: type[T], *, hint: str = "") -> T:
    """Return what a JSON file holds, as `kind` (a TypedDict, say) has it.

    Raises DataError that names the file and its wrong fields and ends in `hint`, OSError if the file cannot be read.
    """
    return parse_json(path.read_bytes(), kind, where=str(path), hint=hint)


def parse_json[T](data: bytes, kind: type[T], *, where: str, hint: str = "") -> T:
    """Return what the JSON `data` holds, as `kind` has it. Raises DataError as `read_json`; `where` names the file."""
    try:
        value = load_json(data)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}). {hint}".rstrip()) from error
    return checked(value, kind, where=where, hint=hint)


def load_json(data: bytes) -> Any:
    """Return what JSON holds, of any types. Raises ValueError if it is none, says a thing twice or is too deep."""
    try:
        return json.loads(data, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def checked[T](value: Any, kind: type[T], *, where: str, hint: str = "") -> T:
    """Return a value that was read, if it is of the types of `kind`. Raises DataError as `read_json`."""
    try:
        return _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        wrong = [_described(one) for one in error.errors(include_url=False, include_context=False)]
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        problems = f"{'; '.join(wrong[:NAMED])}{more}"
        raise DataError(f"{where} is not what it should be: {problems}. {hint}".rstrip()) from error


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _described(error: Any) -> str:
    place = ".".join(map(str, error["loc"])) or "the whole"
    found = "" if error["type"] == "missing" else f", found {_shown(error['input'])}"
    return f"{place}: {error['msg'][:1].lower()}{error['msg'][1:]}{found}"


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to spell thousands of digits
        return f"a number of {value.bit_length()} bits"
    return repr(value)[:SHOWN] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def file_name(name: object, *, where: str | Path, hint: str = "") -> str:
    """Return the name of a file that stands in the file `where`, if it is one of that file's own folder.

    Raises DataError for a path, which would lead elsewhere, and for what is no name.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(part in name for part in "/\\\0"):
        raise DataError(f"{where} names {_shown(name)}, which is no file of its folder. {hint}".rstrip())
    return name
