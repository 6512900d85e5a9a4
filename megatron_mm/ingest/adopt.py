"""An existing pair of Megatron-LM, P.bin and P.idx, made shards: nothing is copied or changed, the rest is added.

Megatron-LM's tools write no manifest, checksums or tokenizer; what they wrote is read once, from its first byte to its
last, and is refused where this package could not train on it as it stands.
"""

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm.errors import ConfigError, DataError
from megatron_mm.modalities import BY_NAME
from megatron_mm.shards import Counts, TokenizerInfo
from megatron_mm.shards.format import (
    BLOCK_BYTES,
    DOCUMENT,
    MANIFEST_VERSION,
    MEDIA_HEADER,
    MEDIA_MAGIC,
    MEDIA_VERSION,
    PAGE_BYTES,
    PAGES_SUFFIX,
    TOKEN_DTYPES,
    TOKEN_HEADER,
    TOKEN_MAGIC,
    TOKEN_VERSION,
    TOKENIZER_SUFFIX,
)
from megatron_mm.shards.writer import CheckedFile, write_manifest
from megatron_mm.source import Source
from megatron_mm.storage import PARTIAL, give_name, replacing
from megatron_mm.tokenizer import SPECIAL_TOKENS, TextTokenizer

OTHER_DTYPES = {6: "float64", 7: "float32"}
"""megatron-core's codes of types that are no ids."""
INDEX_ELEMENTS = 2**20
"""Elements of the index that are read at a time."""
ADDED = (PAGES_SUFFIX, ".media.bin", ".media.idx")
"""Files that are added, in the order in which they get their names; the tokenizer and the manifest come after them."""


def adopt(
    prefix: str,
    tokenizer: TextTokenizer,
    *,
    end_of_text: bool = True,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> Counts:
    """Make the pair `prefix`.bin and .idx shards by adding what they lack, and return what they hold.

    `tokenizer` must be the one that the ids come from. Raises ConfigError if there is no pair, or there are shards;
    DataError if the pair is cut short or damaged, has documents of several sequences, ids that are no text of the
    vocabulary or, unless `end_of_text` is false, documents that do not end in end-of-text.
    """
    pair = _open_pair(prefix)
    sums = CheckedFile(prefix + PAGES_SUFFIX + PARTIAL)
    try:
        sums.restore([])
        lasts, blocks = _read_tokens(pair, tokenizer.info, sums, progress)
        if end_of_text:
            _check_ends(pair, lasts, tokenizer)
        index_blocks = [_sum_block(block, sums, progress) for block in _blocks(prefix + ".idx")]
        files = {".bin": _summary(prefix + ".bin", blocks), ".idx": _summary(prefix + ".idx", index_blocks)}
        return _publish(pair, tokenizer, files, sums, end_of_text=end_of_text)
    finally:
        sums.close()
        for suffix in ADDED:
            Path(prefix + suffix + PARTIAL).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Pair:
    """What the index of a pair says; it agrees with itself and with the sizes of both files."""

    prefix: str
    dtype: np.dtype
    num_documents: int
    num_tokens: int

    def lengths(self) -> Iterator[np.ndarray]:
        """Yield the tokens of documents: (n,) int32."""
        yield from _elements(self.prefix + ".idx", np.dtype("<i4"), TOKEN_HEADER.size, self.num_documents)


def _open_pair(prefix: str) -> _Pair:
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            raise ConfigError(f"{prefix}{suffix} does not exist: give the prefix of a pair P.bin and P.idx.")
    if Path(prefix + ".json").exists():
        raise ConfigError(f"{prefix}.json exists: these are shards already. Use them as they are.")
    if Path(prefix + ".media.bin").exists() and os.path.getsize(prefix + ".media.bin"):
        raise ConfigError(
            f"{prefix}.media.bin holds media: these are shards of this package that lost their manifest {prefix}.json, "
            "not a pair of Megatron-LM. Restore that from a copy, or preprocess the inputs again."
        )
    path = prefix + ".idx"
    with open(path, "rb") as file:
        header = file.read(TOKEN_HEADER.size)
    if len(header) < TOKEN_HEADER.size or not header.startswith(TOKEN_MAGIC):
        raise DataError(f"{path} is not an index of megatron-core: it does not begin with {TOKEN_MAGIC[:7].decode()}.")
    _, version, code, num_sequences, num_boundaries = TOKEN_HEADER.unpack(header)
    if version != TOKEN_VERSION or code not in TOKEN_DTYPES:
        what = f"ids of type {OTHER_DTYPES.get(code, code)}" if version == TOKEN_VERSION else f"version {version}"
        raise DataError(f"{path} has {what}, and ids are read as integers of version {TOKEN_VERSION} of the format.")
    _check_structure(path, num_sequences, num_boundaries)
    pair = _Pair(prefix, TOKEN_DTYPES[code], num_sequences, _check_pointers(path, TOKEN_DTYPES[code], num_sequences))
    expected, found = pair.num_tokens * pair.dtype.itemsize, os.path.getsize(prefix + ".bin")
    if found != expected:
        raise DataError(
            f"{prefix}.bin has {found} bytes, and {path} tells of {expected}: it was cut short, or belongs to another "
            "index. Copy both again from where they were made."
        )
    if not pair.num_documents:
        raise DataError(f"{path} holds no documents. Leave it out.")
    return pair


def _check_structure(path: str, num_sequences: int, num_boundaries: int) -> None:
    """Pass if an index is of its size and each of its documents is one sequence."""
    found, expected = os.path.getsize(path), TOKEN_HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if found == expected + num_sequences and num_sequences:
        raise DataError(
            f"{path} has a mode for each sequence, as preprocess_mmdata.py writes it: such pairs mix text and images "
            "and are not read. Preprocess the inputs again with tools/preprocess_data.py."
        )
    if found != expected:
        raise DataError(
            f"{path} has {found} bytes, and its header tells of {expected}: it was cut short, or is damaged. Copy it "
            "again from where it was made."
        )
    start = TOKEN_HEADER.size + 12 * num_sequences
    first = 0
    for numbers in _elements(path, np.dtype("<i8"), start, num_boundaries):
        if num_boundaries != num_sequences + 1 or (numbers != np.arange(first, first + len(numbers))).any():
            raise DataError(
                f"{path} has {num_sequences} sequences in {num_boundaries - 1} documents, as preprocess_data.py "
                "--split-sentences writes it, and here a document is one sequence. Preprocess the inputs again, "
                "without that option or with tools/preprocess_data.py."
            )
        first += len(numbers)


def _check_pointers(path: str, dtype: np.dtype, num_documents: int) -> int:
    """Pass if documents follow one another without a gap, and return the tokens of all."""
    lengths = _elements(path, np.dtype("<i4"), TOKEN_HEADER.size, num_documents)
    pointers = _elements(path, np.dtype("<i8"), TOKEN_HEADER.size + 4 * num_documents, num_documents)
    done = first = 0
    for own, found in zip(lengths, pointers, strict=True):
        if (own < 1).any():
            raise DataError(
                f"{path}: document {first + int((own < 1).argmax())} has {own.min()} tokens, and a document has some. "
                "Preprocess the inputs again without empty documents."
            )
        ends = done + np.cumsum(own, dtype=np.int64)
        expected = np.concatenate([[done], ends[:-1]]) * dtype.itemsize
        if (found != expected).any():
            document = first + int((found != expected).argmax())
            raise DataError(
                f"{path}: document {document} does not begin where the one before it ends, so the pair is damaged or "
                "was not written by megatron-core. Copy it again from where it was made."
            )
        done, first = int(ends[-1]), first + len(own)
    return done


def _read_tokens(
    pair: _Pair, info: TokenizerInfo, sums: CheckedFile, progress: Callable[[int], None]
) -> tuple[Counter[int], list[int]]:
    """Return how often each id ends a document, and the checksums of the blocks of the tokens; pages go to `sums`."""
    lasts: Counter[int] = Counter()
    blocks: list[int] = []
    placeholders = [(info.special_ids[name], SPECIAL_TOKENS[name]) for name in SPECIAL_TOKENS if name in BY_NAME]
    lengths, waiting, start, before = pair.lengths(), np.zeros(0, np.int64), 0, 0
    for block in _blocks(pair.prefix + ".bin"):
        ids = np.frombuffer(block, pair.dtype)
        if not 0 <= ids.min() <= ids.max() < info.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise DataError(
                f"{pair.prefix}.bin holds the id {wrong}, and the tokenizer has {info.vocab_size}: it is not the one "
                "that these ids come from. Give that one with --tokenizer."
            )
        for placeholder, spelling in placeholders:
            if (ids == placeholder).any():
                raise DataError(
                    f"{pair.prefix}.bin holds the id {placeholder}, which is {spelling} in this tokenizer: it stands "
                    "for media, and such a pair has none. Preprocess the inputs again with tools/preprocess_data.py."
                )
        while (not len(waiting) or waiting[-1] < start + len(ids)) and (more := next(lengths, None)) is not None:
            ends = before + np.cumsum(more, dtype=np.int64)
            waiting, before = np.concatenate([waiting, ends]), int(ends[-1])
        count = int(np.searchsorted(waiting, start + len(ids), side="right"))
        found, numbers = np.unique(ids[waiting[:count] - 1 - start], return_counts=True)
        lasts.update(dict(zip(found.tolist(), numbers.tolist(), strict=True)))
        waiting, start = waiting[count:], start + len(ids)
        blocks.append(_sum_block(block, sums, progress))
    return lasts, blocks


def _check_ends(pair: _Pair, lasts: Counter[int], tokenizer: TextTokenizer) -> None:
    """Pass if every document ends in end-of-text. Raises DataError with the share of those that do not."""
    end = tokenizer.special_ids["end_of_text"]
    without = pair.num_documents - lasts[end]
    if not without:
        return
    spelling = SPECIAL_TOKENS["end_of_text"]
    other, number = next(one for one in lasts.most_common(2) if one[0] != end)
    usual = f"{number} end in {tokenizer.decode([other])!r} (id {other}). " if 2 * number > pair.num_documents else ""
    raise DataError(
        f"{pair.prefix}: {without} of {pair.num_documents} documents ({without / pair.num_documents:.1%}) do not end "
        f"in end-of-text, which is {spelling} (id {end}) in {tokenizer.path}. {usual}A model would not learn from them "
        f"where a text ends. If another token ends texts, give a copy of the tokenizer in which it is spelled "
        f"{spelling}; if they were written without --append-eod and that is meant, use --no-end-of-text."
    )


def _publish(
    pair: _Pair, tokenizer: TextTokenizer, files: dict[str, Any], sums: CheckedFile, *, end_of_text: bool
) -> Counts:
    """Write the files that are added, the manifest last."""
    prefix = pair.prefix
    made = {suffix: CheckedFile(prefix + suffix + PARTIAL) for suffix in ADDED[1:]} | {PAGES_SUFFIX: sums}
    for suffix in ADDED[1:]:
        made[suffix].restore([])
    made[".media.idx"].write(MEDIA_HEADER.pack(MEDIA_MAGIC, MEDIA_VERSION, pair.num_documents, 0))
    for start in range(0, pair.num_documents, INDEX_ELEMENTS):
        records = np.zeros(min(INDEX_ELEMENTS, pair.num_documents - start), DOCUMENT)
        records["source"] = Source.TEXT
        made[".media.idx"].write(records)
    for block in made[".media.idx"].read_back():
        _sum_pages(block, sums)
    for file in made.values():
        file.sync()
    files |= {suffix: made[suffix].summary() for suffix in ADDED[1:]}
    for suffix in ADDED:
        give_name(Path(prefix + suffix + PARTIAL), Path(prefix + suffix))
    for file in made.values():
        file.close()
    with replacing(Path(prefix + TOKENIZER_SUFFIX)) as stored:
        stored.write(tokenizer.content)
    counts = Counts(pair.num_documents, pair.num_tokens, {Source.TEXT.name.lower(): pair.num_documents})
    manifest = {"version": MANIFEST_VERSION, **asdict(counts), "tokenizer": asdict(tokenizer.info), "files": files}
    manifest |= {"pages": sums.summary(), "adopted": {"end_of_text": end_of_text}}
    write_manifest(prefix, manifest)
    return counts


def _summary(path: str, blocks: list[int]) -> dict[str, Any]:
    return {"bytes": os.path.getsize(path), "block_crc32": blocks}


def _sum_block(block: bytes, sums: CheckedFile, progress: Callable[[int], None]) -> int:
    """Append the checksums of the pages of a block to `sums` and return its own."""
    _sum_pages(memoryview(block), sums)
    progress(len(block))
    return zlib.crc32(block)


def _sum_pages(block: memoryview, sums: CheckedFile) -> None:
    pages = range(0, len(block), PAGE_BYTES)
    sums.write(np.asarray([zlib.crc32(block[page : page + PAGE_BYTES]) for page in pages], "<u4"))


def _blocks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _elements(path: str, dtype: np.dtype, offset: int, count: int) -> Iterator[np.ndarray]:
    """Yield elements of a part of an index, a bounded number at a time."""
    with open(path, "rb") as file:
        file.seek(offset)
        for start in range(0, count, INDEX_ELEMENTS):
            yield np.fromfile(file, dtype, min(INDEX_ELEMENTS, count - start))
