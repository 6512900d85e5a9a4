"""What Hugging Face's datasets write of the columns of a Parquet or Arrow file: which of them are media."""

from collections.abc import Mapping
from typing import Any

import orjson

KEY = b"huggingface"
"""Under which the schema of a file keeps {"info": {"features": {COLUMN: {"_type": "Image"}, ...}}}."""
KINDS = {"Image": "image", "Audio": "audio", "Video": "video"}


def declared_media(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    """Return the columns that the metadata of a schema declares to be media, or lists of them, by kind."""
    try:
        features = orjson.loads((metadata or {}).get(KEY, b"{}"))["info"]["features"]
        found = {name: _kind(feature) for name, feature in features.items()}
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return {}
    return {name: kind for name, kind in found.items() if kind}


def _kind(feature: Any) -> str:
    """Return the kind of a feature: {"_type": "Image"}, a list of one, or a List or Sequence whose feature is one."""
    if isinstance(feature, list) and len(feature) == 1:
        return _kind(feature[0])
    if not isinstance(feature, dict):
        return ""
    name = feature.get("_type")
    return _kind(feature.get("feature")) if name in ("List", "LargeList", "Sequence") else KINDS.get(name, "")
