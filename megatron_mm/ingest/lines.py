"""JSON lines of plain text, the bulk of most corpora: as `read_lines` and `encode_document` give, many times faster."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_mm.errors import DataError
from megatron_mm.ingest import account
from megatron_mm.ingest.document import Document, Origin, Reading, Rejection, TextSegment
from megatron_mm.ingest.encode import encode_texts, encode_together, is_unicode
from megatron_mm.ingest.fields import Schemas, is_plain
from megatron_mm.ingest.filters import document_text, select, wrong_language, wrong_length
from megatron_mm.ingest.origins import KEPT, Said, origins_of, origins_of_lines, said_of
from megatron_mm.ingest.work_items import Options, WorkItem
from megatron_mm.shards import EncodedBatch, EncodedDocument
from megatron_mm.source import Source
from megatron_mm.tokenizer import TextTokenizer

Encoded = tuple[EncodedBatch, list[Rejection]]
"""The documents of a piece of work, and what was left out of it."""


def encode_lines(work: WorkItem, tokenizer: TextTokenizer, options: Options) -> Encoded:
    """Return the documents of a range of lines; a bad line is a rejection of its own.

    Plain text goes the short way; whatever else a line may be, `read_lines` reads it. Raises DataError if documents
    and rejections do not account for every line.
    """
    lines = work.read().split(b"\n")
    shapes: Counter[tuple[str, ...]] = Counter()
    texts: list[str] = []
    numbers: list[int] = []
    starts: list[int] = []
    stops: list[int] = []
    said: list[Said] = []
    others: dict[int, list[Document]] = {}
    rejections: list[Rejection] = []
    start, filled, left_out = work.start, 0, 0
    for number, line in enumerate(lines, start=work.first_line):
        if line and not line.isspace():
            filled += 1
            record = plain_record(line) if not options.schemas.own else None
            if record is not None:
                shapes[tuple(record)] += 1
            if record is None:
                documents, bad = _read_line(work.path, line, start, number, options.schemas)
                rejections += bad
                if documents:
                    others[number] = documents
                left_out += bool(bad) and not documents
            elif reason := wrong_language(record["text"], options):
                rejections.append(Rejection(f"{work.path}:{number}", reason))
                left_out += 1
            else:
                texts.append(record["text"])
                numbers.append(number)
                starts.append(start)
                stops.append(start + len(line))
                said.append(said_of(record))
        start += len(line) + 1
    _count(shapes)
    if len(texts) + len(others) + left_out != filled:
        raise DataError(f"{work.path}: {filled} lines from line {work.first_line} gave {len(texts)} texts.")
    if others:
        documents, places = _in_order(texts, numbers, (starts, stops), said, others)
        names = [f"{work.path}:{place}" for place in places]
        batch, failed = encode_documents(documents, tokenizer, options, names=names, file=str(work.path))
        return batch, [*rejections, *failed]
    batch = replace(encode_texts(texts, tokenizer), origins=origins_of_lines(str(work.path), starts, stops, said))
    batch, failed = _of_right_length(batch, options, [f"{work.path}:{number}" for number in numbers])
    return batch, [*rejections, *failed]


def plain_record(line: bytes) -> dict[str, Any] | None:
    """Return the object on a line if it has text and nothing that is, or names, media; None if it is anything else."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return record if type(record) is dict and is_plain(record) else None


def _count(shapes: Counter[tuple[str, ...]]) -> None:
    """Count plain lines, by the names of their fields."""
    for names, number in shapes.items():
        account.count(account.INPUTS, "JSON lines", number)
        for name in names:
            account.count(account.USED if name in KEPT else account.NOT_USED, name, number)


def encode_documents(
    documents: Sequence[Document], tokenizer: TextTokenizer, options: Options, *, names: Sequence[str], file: str
) -> Encoded:
    """Return `documents` of a file encoded as one batch; one that cannot be is a rejection by its name."""
    rejections: list[Rejection] = []
    taken: list[tuple[str, Document]] = []
    for name, document in zip(names, documents, strict=True):
        if reason := wrong_language(document_text(document), options) if options.languages else "":
            rejections.append(Rejection(name, reason))
        else:
            taken.append((name, document))
    batch, failed = _encode([document for _, document in taken], tokenizer, options, [name for name, _ in taken], file)
    return batch, [*rejections, *failed]


def _encode(
    documents: Sequence[Document], tokenizer: TextTokenizer, options: Options, names: Sequence[str], file: str
) -> Encoded:
    texts = [_only_text(document) for document in documents]
    if None not in texts:
        batch = replace(
            encode_texts(texts, tokenizer),
            sources=np.asarray([document.source for document in documents], np.uint8),
            origins=origins_of(file, [document.origin for document in documents]),
        )
        return _of_right_length(batch, options, names)
    rejections: list[Rejection] = []
    how = {"geometries": options.geometries, "max_audio_seconds": options.max_audio_seconds}
    encoded: list[EncodedDocument] = []
    origins: list[Origin] = []
    for name, document, made in zip(names, documents, encode_together(documents, tokenizer, **how), strict=True):
        reason = str(made) if isinstance(made, DataError) else wrong_length(len(made.tokens), options)
        if reason:
            rejections.append(Rejection(name, reason))
        else:
            encoded.append(made)
            origins.append(document.origin)
    return replace(EncodedBatch.of(encoded), origins=origins_of(file, origins)), rejections


def _only_text(document: Document) -> str | None:
    """Return the text of a document that is nothing but one, of Unicode; None of any other."""
    if len(document.segments) != 1 or not isinstance(document.segments[0], TextSegment):
        return None
    text = document.segments[0].text
    return text if is_unicode(text) else None


def _of_right_length(batch: EncodedBatch, options: Options, names: Sequence[str]) -> Encoded:
    """Return the text documents of a batch that are as long as `options` ask for, and the others as rejections."""
    if options.min_tokens <= 1 and options.max_tokens is None:
        return batch, []
    reasons = [wrong_length(length, options) for length in batch.lengths.tolist()]
    rejections = [Rejection(name, reason) for name, reason in zip(names, reasons, strict=True) if reason]
    return select(batch, np.asarray([not reason for reason in reasons], bool)), rejections


def _read_line(path: Path, line: bytes, start: int, number: int, schemas: Schemas) -> Reading:
    # The readers of media take half a second to load, which runs over plain text are spared.
    from megatron_mm.ingest.records import read_lines

    return read_lines(path, start=start, data=line, first_line=number, schemas=schemas)


def _in_order(
    texts: Sequence[str],
    numbers: Sequence[int],
    spans: tuple[Sequence[int], Sequence[int]],
    said: Sequence[Said],
    others: dict[int, list[Document]],
) -> tuple[list[Document], list[int]]:
    """Return the texts and the other documents in the order of their lines, and the number of the line of each."""
    made = dict(others)
    for text, number, start, stop, (url, licence, date) in zip(texts, numbers, *spans, said, strict=True):
        made[number] = [Document([TextSegment(text)], Source.TEXT, Origin(url, licence, date, start, stop))]
    ordered = sorted(made.items())
    return [document for _, own in ordered for document in own], [number for number, own in ordered for _ in own]
