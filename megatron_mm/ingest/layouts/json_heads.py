"""Small JSON files that describe what lies beside them."""

from pathlib import Path
from typing import Any

import orjson

MAX_BYTES = 16 * 2**20
"""Larger files describe nothing: they are data."""


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, None if it holds none or is too large for a description."""
    if path.stat().st_size > MAX_BYTES:
        return None
    try:
        value = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
