"""Where documents come from: what their records say of it, and the columns that shards keep."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_mm.ingest.document import Origin
from megatron_mm.shards.origins import Origins, shared

URL_FIELDS = ("url", "URL", "uri", "source_url", "image_url")
LICENCE_FIELDS = ("license", "licence", "LICENSE", "license_url")
DATE_FIELDS = ("date", "timestamp", "created", "published", "date_download", "warc_date")
FIELDS = frozenset((*URL_FIELDS, *LICENCE_FIELDS, *DATE_FIELDS))
"""Fields of a record that say where it came from; of those that mean the same the first that is there counts."""

KEPT = FIELDS | {"text"}
"""Fields of a plain record that are kept: its text, and where it came from."""

Said = tuple[str, str, str]
"""The address, licence and date of a document; "" for what is not said."""
NOTHING: Said = ("", "", "")


def said_of(record: Mapping[str, Any]) -> Said:
    """Return the address, licence and date that a record gives."""
    if FIELDS.isdisjoint(record):
        return NOTHING
    return _first(record, URL_FIELDS), _first(record, LICENCE_FIELDS), _first(record, DATE_FIELDS)


def _first(record: Mapping[str, Any], names: Sequence[str]) -> str:
    value = next((record[name] for name in names if record.get(name) is not None), "")
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def origins_of_lines(file: str, starts: Sequence[int], stops: Sequence[int], said: Sequence[Said]) -> Origins:
    """Return the origins of lines of a file, by the bytes that they take and what they say."""
    origins = Origins(len(starts), file, np.asarray(starts, np.int64), np.asarray(stops, np.int64))
    if all(one is NOTHING for one in said):
        return origins
    url, licence, date = (shared([one[field] for one in said]) for field in range(3))
    return replace(origins, url=url, licence=licence, date=date)


def origins_of(file: str, found: Sequence[Origin]) -> Origins:
    """Return the origins of documents of a file."""

    def numbers(values: list[int | None]) -> np.ndarray | None:
        is_known = any(value is not None for value in values)
        return np.asarray([-1 if value is None else value for value in values], np.int64) if is_known else None

    words = {name: shared([getattr(one, name) for one in found]) for name in ("member", "url", "licence", "date")}
    start, stop = (numbers([getattr(one, name) for one in found]) for name in ("start", "stop"))
    return Origins(len(found), file, start, stop, **words)
