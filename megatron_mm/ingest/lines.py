"""JSON lines of plain text, the bulk of most corpora: as `read_lines` and `encode_document` give, many times faster."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_mm.errors import DataError
from megatron_mm.ingest import account
from megatron_mm.ingest.document import Document, Rejection
from megatron_mm.ingest.encode import encode_document, encode_texts
from megatron_mm.ingest.fields import MEDIA_NAMES, MEDIA_SUFFIXES, SIZE_COLUMNS, Schemas, built_in
from megatron_mm.ingest.filters import document_text, select, wrong_language, wrong_length
from megatron_mm.ingest.work_items import Options, WorkItem
from megatron_mm.shards import EncodedBatch, EncodedDocument
from megatron_mm.source import Source
from megatron_mm.tokenizer import EncodingMismatch, TextTokenizer

OTHER_FIELDS = (
    MEDIA_NAMES
    | SIZE_COLUMNS
    | {name for fields in built_in() for names in fields.needs for name in names if name != "text"}
)
"""Fields of a line that make it more than text, or text in another order."""
Encoded = tuple[EncodedBatch, list[Rejection]]
"""The documents of a piece of work, and what was left out of it."""


def encode_lines(work: WorkItem, tokenizer: TextTokenizer, options: Options) -> Encoded:
    """Return the documents of a range of lines; a bad line is a rejection of its own.

    Plain text goes the short way; whatever else a line may be, `read_lines` reads it. Raises DataError if documents
    and rejections do not account for every line.
    """
    assert work.stop is not None
    with work.path.open("rb") as file:
        file.seek(work.start)
        lines = file.read(work.stop - work.start).split(b"\n")
    texts: dict[int, str] = {}
    shapes: Counter[tuple[str, ...]] = Counter()
    filtered = 0
    others: dict[int, list[EncodedDocument]] = {}
    rejections: list[Rejection] = []
    start, filled = work.start, 0
    for number, line in enumerate(lines):
        if line and not line.isspace():
            filled += 1
            record = plain_record(line) if not options.schemas.own else None
            text = None if record is None else record["text"]
            if record is not None:
                shapes[tuple(record)] += 1
            place = work.first_line + number
            if text is not None and (reason := wrong_language(text, options)):
                rejections.append(Rejection(f"{work.path}:{place}", reason))
                filtered += 1
            elif text is not None:
                texts[number] = text
            else:
                read, left_out = _read_line(work.path, start, start + len(line), place, options.schemas)
                documents, failed = encode_documents(read, tokenizer, options, place=f"{work.path}:{place}")
                if documents or left_out or failed:
                    others[number] = documents
                rejections += [*left_out, *failed]
        start += len(line) + 1
    _count(shapes)
    batch = encode_texts(list(texts.values()), tokenizer)
    if len(batch.lengths) + len(others) + filtered != filled:
        raise DataError(f"{work.path}: {filled} lines from line {work.first_line} gave {len(batch.lengths)} documents.")
    places = list(texts)
    if options.min_tokens > 1 or options.max_tokens is not None:
        reasons = [wrong_length(length, options) for length in batch.lengths.tolist()]
        rejections += [
            Rejection(f"{work.path}:{work.first_line + number}", reason)
            for number, reason in zip(places, reasons, strict=True)
            if reason
        ]
        places = [number for number, reason in zip(places, reasons, strict=True) if not reason]
        batch = select(batch, np.asarray([not reason for reason in reasons], bool))
    return _in_order(batch, places, others) if others else batch, rejections


def plain_record(line: bytes) -> dict[str, Any] | None:
    """Return the object on a line if it has text and nothing that is, or names, media; None if it is anything else."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if type(record) is not dict or not OTHER_FIELDS.isdisjoint(record):
        return None
    text = record.get("text")
    if type(text) is not str or not text or text.isspace():
        return None
    names_media = any(type(value) is str and value[-5:].lower().endswith(MEDIA_SUFFIXES) for value in record.values())
    return None if names_media else record


def _count(shapes: Counter[tuple[str, ...]]) -> None:
    """Count plain lines, by the names of their fields."""
    for names, number in shapes.items():
        account.count(account.INPUTS, "JSON lines", number)
        for name in names:
            account.count(account.USED if name == "text" else account.NOT_USED, name, number)


def encode_documents(
    documents: list[Document], tokenizer: TextTokenizer, options: Options, *, place: str
) -> tuple[list[EncodedDocument], list[Rejection]]:
    """Return `documents` encoded; one that cannot be is a rejection of `place`."""
    encoded: list[EncodedDocument] = []
    rejections: list[Rejection] = []
    for number, document in enumerate(documents, start=1):
        name = place if len(documents) == 1 else f"{place}, document {number}"
        try:
            reason = wrong_language(document_text(document), options) if options.languages else ""
            how = {"geometries": options.geometries, "max_audio_seconds": options.max_audio_seconds}
            made = None if reason else encode_document(document, tokenizer, **how)
            if made is not None and not (reason := wrong_length(len(made.tokens), options)):
                encoded.append(made)
            else:
                rejections.append(Rejection(name, reason))
        except EncodingMismatch:
            raise
        except DataError as error:
            rejections.append(Rejection(name, str(error)))
    return encoded, rejections


def _read_line(
    path: Path, start: int, stop: int, number: int, schemas: Schemas
) -> tuple[list[Document], list[Rejection]]:
    # The readers of media take half a second to load, which runs over plain text are spared.
    from megatron_mm.ingest.records import read_lines

    return read_lines(path, start=start, stop=stop, first_line=number, schemas=schemas)


def _in_order(batch: EncodedBatch, places: list[int], others: dict[int, list[EncodedDocument]]) -> EncodedBatch:
    """Return the texts, which stand on lines `places`, and the other documents in the order of their lines."""
    lengths = batch.lengths.tolist()
    stops = batch.lengths.cumsum().tolist()
    made = {
        place: [EncodedDocument(batch.tokens[stop - length : stop], Source.TEXT)]
        for place, stop, length in zip(places, stops, lengths, strict=True)
    }
    return EncodedBatch.of([document for _, own in sorted((made | others).items()) for document in own])
