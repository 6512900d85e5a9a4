"""The documents of shards as a table: where they came from, what they hold, and how they begin."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from megatron_mm.errors import ConfigError
from megatron_mm.modalities import BY_KIND
from megatron_mm.printable import line
from megatron_mm.shards import Origins, ShardReader, open_shards, stored_tokenizer
from megatron_mm.shards.format import TOKENIZER_SUFFIX
from megatron_mm.tokenizer import TextTokenizer

BLOCK_DOCUMENTS = 4096
"""Documents whose origins are read at a time."""
BEGINNING_TOKENS, BEGINNING_CHARACTERS = 48, 60
"""How much of a document's text is shown."""
MAX_WIDTH = 48
"""Characters of a cell of a table; a longer one is cut at its start, where paths and addresses are alike."""

Row = dict[str, str]
"""What is shown of a document, by the heading of its column."""


def list_documents(prefix: str, *, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """Yield a row for each of documents [start, stop) of shards, counted over their parts.

    Raises ConfigError if there is no document `start`, DataError if what says where they came from is damaged.
    """
    shards = open_shards([prefix])
    total = sum(shard.num_documents for shard in shards)
    if start and start >= total:
        raise ConfigError(f"--document {start} is none of the {total} of {prefix}: they count from 0.")
    part = shards[0].prefix
    tokenizer = None if stored_tokenizer(part) is None else TextTokenizer(part + TOKENIZER_SUFFIX)
    stop, before = total if stop is None else min(stop, total), 0
    for shard in shards:
        own = range(max(0, start - before), min(stop - before, shard.num_documents))
        for first in range(own.start, own.stop, BLOCK_DOCUMENTS):
            last = min(first + BLOCK_DOCUMENTS, own.stop)
            origins = shard.origins(first, last) or Origins(last - first)
            for number in range(first, last):
                said = _origin(origins, number - first)
                yield {"document": str(before + number), **said, **_content(shard, number, tokenizer)}
        before += shard.num_documents


def _origin(origins: Origins, index: int) -> Row:
    words = {name: origins.column(name)[index] for name in ("file", "member", "url", "licence", "date")}
    start, stop = origins.column("start")[index], origins.column("stop")[index]
    where = "" if start is None else f"row {start}" if stop is None else f"bytes {start} to {stop}"
    return {"file": words.pop("file"), "member": words.pop("member"), "place": where, **words}


def _content(shard: ShardReader, number: int, tokenizer: TextTokenizer | None) -> Row:
    media = Counter(BY_KIND[int(kind)].name for kind in shard.media(number)["kind"])
    return {
        "tokens": str(shard.length(number)),
        "media": ", ".join(f"{count} {name}" for name, count in media.items()),
        "text": "" if tokenizer is None else _beginning(shard, number, tokenizer),
    }


def _beginning(shard: ShardReader, number: int, tokenizer: TextTokenizer) -> str:
    """Return the first words of a document, behind the media that it begins with."""
    special = list(tokenizer.special_ids.values())
    length, start = shard.length(number), 0
    while start < length:
        tokens = shard.tokens(number, start, min(start + BEGINNING_TOKENS, length))
        tokens = tokens[~np.isin(tokens, special)]
        if len(tokens):
            return " ".join(tokenizer.decode(tokens.tolist())[:BEGINNING_CHARACTERS].split())
        start += BEGINNING_TOKENS
    return ""


def render_table(rows: Sequence[Row]) -> str:
    """Return rows as a table, without the columns that are empty in all of them."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    cells = [names, *([_cut(line(row[name]), name) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def render_one(row: Row) -> str:
    """Return all that is known of one document, a line for each thing."""
    return "\n".join(f"{name:<9} {line(value)}" for name, value in row.items() if value)


def _cut(text: str, name: str) -> str:
    if len(text) <= MAX_WIDTH:
        return text
    return text[: MAX_WIDTH - 3] + "..." if name == "text" else "..." + text[3 - MAX_WIDTH :]
