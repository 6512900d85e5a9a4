"""Preprocessing: paths in, shards out, over several worker processes, every input accounted for."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from megatron_mm.errors import DataError
from megatron_mm.ingest import account, kinds, work_items
from megatron_mm.ingest.account import Account
from megatron_mm.ingest.document import Rejection, TextSegment
from megatron_mm.ingest.filters import check_languages
from megatron_mm.ingest.find import find_files
from megatron_mm.ingest.lines import Encoded, encode_documents, encode_lines
from megatron_mm.ingest.plan import EVERYTHING, Share, WorkPlan
from megatron_mm.ingest.report import LISTED, Report
from megatron_mm.ingest.work_items import (
    DEFAULTS,
    Options,
    WorkItem,
    cut_work,
    read_all,
    read_work,
)
from megatron_mm.ingest.workers import Cut, Failure, Workers
from megatron_mm.printable import line
from megatron_mm.shards import EncodedBatch, ShardWriter
from megatron_mm.tokenizer import EncodingMismatch, Engine, TextTokenizer

Made = tuple[Encoded, Account]
"""The documents of a piece of work, what was left out of it, and what was counted on the way."""


def preprocess(
    inputs: Sequence[str],
    *,
    output_prefix: str,
    tokenizer_path: str,
    workers: int = 1,
    skip_bad: bool = False,
    options: Options = DEFAULTS,
    engine: Engine = "auto",
    share: Share = EVERYTHING,
    follow_links: bool = False,
) -> Report:
    """Read every file under `inputs` and write one set of shards; the result does not depend on `workers`.

    A run that was killed is gone on with by the next one with the same inputs and settings, to the same bytes. What
    cannot be read is listed in `output_prefix`.rejected.jsonl, with its reason, if `skip_bad`; otherwise the first
    such input ends the run and nothing is written. Raises DataError for that, for a path that does not exist, and if
    nothing is left to write.
    """
    check_languages(options.languages)
    finding = find_files(inputs, follow_links=follow_links, output_prefix=output_prefix, tokenizer=tokenizer_path)
    plan = WorkPlan(finding, share, layout=options.layout)
    make_task = functools.partial(_make_task, tokenizer_path, engine, options)
    with Workers(workers, make_task, split=cut_work) as pool:  # started first: they load their tokenizers meanwhile
        tokenizer = TextTokenizer(tokenizer_path, engine=engine)
        tokenizer.require_every_text()
        key = _resume_key(plan, tokenizer, skip_bad, options)
        prefix, content = share.prefix(output_prefix), tokenizer.content
        parts = {"tokenizer_content": content, "resume_key": key, "geometries": options.geometries}
        with ShardWriter(prefix, tokenizer=tokenizer.info, **parts) as writer:
            plan.restore(writer.progress)
            progress = tqdm(total=plan.num_bytes, initial=plan.done_bytes, unit="B", unit_scale=True, desc="preprocess")
            with progress:
                for item, result in pool.run(plan.work()):
                    _take_in(writer, plan, item, result, skip_bad=skip_bad)
                    if plan.finish(item):
                        writer.commit_if_due(plan.progress())
                    progress.update(plan.done_bytes - progress.n)
                    progress.set_postfix(
                        documents=writer.counts.documents, rejected=writer.counts.rejected, refresh=False
                    )
            rejections = [Rejection(**record) for record in writer.rejections(LISTED)]
            report = Report(writer.counts, plan.num_done, rejections, plan.files(), plan.account, share.task)
            if not writer.counts.documents and share.tasks == 1:
                raise DataError(f"{report.nothing()}. {_first_bad(rejections)}".strip())
            writer.report = report.to_json()
    return report


def _take_in(
    writer: ShardWriter, plan: WorkPlan, item: WorkItem, result: "Made | str | Failure", *, skip_bad: bool
) -> None:
    """Write what a worker made of a piece of work. Raises DataError at something bad unless `skip_bad`.

    Raises AssertionError, whatever is skipped, if not all that was read is accounted for: a reader is wrong then.
    """
    if isinstance(result, str):
        raise EncodingMismatch(result)
    if isinstance(result, Failure):
        counted = {account.INPUTS: {"what could not be read": 1}}
        result = (EncodedBatch.of([]), [Rejection(item.place, result.reason)]), counted
    (batch, rejections), counted = result
    whole = sum(not one.is_part for one in rejections)
    wrong = account.imbalance(counted, documents=len(batch.lengths), rejected=whole)
    assert not wrong, f"{item.place}: {wrong}"
    plan.take_in(counted)
    if not skip_bad and (bad := [rejection for rejection in rejections if not rejection.is_filtered]):
        raise DataError(_first_bad(bad))
    writer.add_batch(batch)
    for rejection in rejections:
        writer.add_rejection(asdict(rejection))


def _names(place: str, count: int) -> list[str]:
    """Return what a rejection calls each of the documents of a piece of work."""
    return [place] if count == 1 else [f"{place}, document {number}" for number in range(1, count + 1)]


def read_texts(inputs: Sequence[str]) -> Iterator[str]:
    """Yield the text of every document under `inputs`, in a fixed order. Raises DataError at the first bad input."""
    for item in WorkPlan(find_files(inputs), EVERYTHING).work():
        for documents, rejections in read_all(item, DEFAULTS):
            if rejections:
                raise DataError(f"{line(rejections[0].path)}: {line(rejections[0].reason)}")
            for document in documents:
                yield from (segment.text for segment in document.segments if isinstance(segment, TextSegment))


def _resume_key(plan: WorkPlan, tokenizer: TextTokenizer, skip_bad: bool, options: Options) -> str:
    """Return what is the same for two runs only if they write the same bytes."""
    files = [
        (str(one.path), [_changed(path) for path in one.beside], size, one.refusal or one.path.stat().st_mtime_ns)
        for one, size in zip(plan.entries, plan.sizes)
    ]
    settings = [
        asdict(tokenizer.info),
        tokenizer.engine,
        skip_bad,
        options.fingerprint(),
        asdict(plan.share),
        [work_items.LINES_BYTES, work_items.ARCHIVE_BYTES],
    ]
    return hashlib.sha256(json.dumps([files, settings]).encode()).hexdigest()


def _changed(path: Path) -> tuple[str, int]:
    return str(path), path.stat().st_mtime_ns


def _make_task(
    tokenizer_path: str, engine: Engine, options: Options
) -> "Callable[[WorkItem], Made | Cut[WorkItem] | str]":
    """Return what a worker does with each piece of work; it loads the tokenizer once."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = TextTokenizer(tokenizer_path, engine=engine)

    def read_and_encode(work: WorkItem) -> Made | Cut[WorkItem] | str:
        with account.collected() as counted:
            try:
                encoded = _read_and_encode(work, tokenizer, options)
            except EncodingMismatch as error:  # not a rejection: it ends the run
                return str(error)
        return encoded if isinstance(encoded, Cut) else (encoded, counted)

    return read_and_encode


def _read_and_encode(work: WorkItem, tokenizer: TextTokenizer, options: Options) -> Encoded | Cut[WorkItem]:
    if work.kind == kinds.JSONL and not work.refusal:
        return encode_lines(work, tokenizer, options)
    reading = read_work(work, options)
    if isinstance(reading, Cut):
        return reading
    documents, rejections = reading
    names = _names(work.place, len(documents))
    batch, failed = encode_documents(documents, tokenizer, options, names=names, file=str(work.path))
    return batch, [*rejections, *failed]


def _first_bad(rejections: Sequence[Rejection]) -> str:
    if not rejections:
        return ""
    path, reason = line(rejections[0].path), line(rejections[0].reason)
    return f"{path}: {reason.rstrip('.')}. Mend it, or leave out what cannot be read with --bad-input skip."
