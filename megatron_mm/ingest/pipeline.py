"""Preprocessing: paths in, shards out, over several worker processes, every input accounted for."""

import functools
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from megatron_mm.errors import ConfigError, DataError
from megatron_mm.ingest import kinds, work_items
from megatron_mm.ingest.beside import refuse_found
from megatron_mm.ingest.captions import pair_captions
from megatron_mm.ingest.document import Rejection, TextSegment
from megatron_mm.ingest.filters import check_languages
from megatron_mm.ingest.lines import Encoded, encode_documents, encode_lines
from megatron_mm.ingest.work_items import (
    DEFAULTS,
    Options,
    WorkItem,
    cut_file,
    cut_work,
    read_all,
    read_work,
)
from megatron_mm.ingest.workers import Cut, Failure, Workers
from megatron_mm.printable import line
from megatron_mm.shards import Counts, EncodedBatch, ShardWriter
from megatron_mm.tokenizer import EncodingMismatch, Engine, TextTokenizer

LISTED = 1_000
"""Rejections that a report names; all of them are in P.rejected.jsonl."""


@dataclass(frozen=True)
class Report:
    """What became of the inputs."""

    counts: Counts
    num_inputs: int
    rejections: Sequence[Rejection]
    """The first LISTED of counts.rejected."""


@dataclass(frozen=True)
class Share:
    """Which part of the inputs one of several runs reads: the files, or ranges of lines, that begin in its bytes."""

    task: int = 0
    tasks: int = 1

    def prefix(self, output_prefix: str) -> str:
        """Return where this run writes: one of several writes shards of its own, to be merged."""
        return output_prefix if self.tasks == 1 else f"{output_prefix}-{self.task:05d}-of-{self.tasks:05d}"


EVERYTHING = Share()


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
    plan = WorkPlan(find_files(inputs, follow_links=follow_links), share)
    make_task = functools.partial(_make_task, tokenizer_path, engine, options)
    with Workers(workers, make_task, split=cut_work) as pool:  # started first: they load their tokenizers meanwhile
        tokenizer = TextTokenizer(tokenizer_path, engine=engine)
        key = _resume_key(plan, tokenizer, skip_bad, options)
        prefix, content = share.prefix(output_prefix), tokenizer.content
        parts = {"tokenizer_content": content, "resume_key": key, "geometries": options.geometries}
        with ShardWriter(prefix, tokenizer=tokenizer.info, **parts) as writer:
            plan.restore(writer.progress)
            progress = tqdm(total=plan.num_bytes, initial=plan.done_bytes, unit="B", unit_scale=True, desc="preprocess")
            with progress:
                for item, result in pool.run(plan.work()):
                    _take_in(writer, item, result, skip_bad=skip_bad)
                    if plan.finish(item):
                        writer.commit_if_due(plan.progress())
                    progress.update(plan.done_bytes - progress.n)
                    progress.set_postfix(
                        documents=writer.counts.documents, rejected=writer.counts.rejected, refresh=False
                    )
            rejections = [Rejection(**record) for record in writer.rejections(LISTED)]
            if not writer.counts.documents and share.tasks == 1:
                raise DataError(f"none of the {plan.num_done} inputs gave a document. " + _first_bad(rejections))
    return Report(writer.counts, plan.num_done, rejections)


def _take_in(writer: ShardWriter, item: WorkItem, result: "Encoded | str | Failure", *, skip_bad: bool) -> None:
    """Write what a worker made of a piece of work. Raises DataError at something bad unless `skip_bad`."""
    if isinstance(result, str):
        raise EncodingMismatch(result)
    if isinstance(result, Failure):
        result = EncodedBatch.of([]), [Rejection(_place(item), result.reason)]
    batch, rejections = result
    if not skip_bad and (bad := [rejection for rejection in rejections if not rejection.is_filtered]):
        raise DataError(_first_bad(bad))
    writer.add_batch(batch)
    for rejection in rejections:
        writer.add_rejection(asdict(rejection))


def _place(item: WorkItem) -> str:
    return str(item.path) if item.stop is None else f"{item.path}:{item.first_line}"


def read_texts(inputs: Sequence[str]) -> Iterator[str]:
    """Yield the text of every document under `inputs`, in a fixed order. Raises DataError at the first bad input."""
    for item in WorkPlan(find_files(inputs), EVERYTHING).work():
        for documents, rejections in read_all(item, DEFAULTS):
            if rejections:
                raise DataError(f"{line(rejections[0].path)}: {line(rejections[0].reason)}")
            for document in documents:
                yield from (segment.text for segment in document.segments if isinstance(segment, TextSegment))


@dataclass(frozen=True)
class Found:
    """A file under an input, or something else that nobody reads."""

    path: Path
    refusal: str = ""
    """Why it is not opened."""


def find_files(inputs: Sequence[str], *, follow_links: bool = False) -> list[Found]:
    """Return what there is under `inputs` in a fixed order; hidden files, and what is in hidden folders, are left out.

    What an input names is read, whatever it is a link to. Below a folder, links that lead out of it are refused, unless
    `follow_links` has those to files read. Raises ConfigError for an input that does not exist, DataError if
    nothing is found.
    """
    files: list[Found] = []
    for text in inputs:
        path = Path(text)
        if not path.exists():
            raise ConfigError(f"{path} does not exist: --input takes files and folders.")
        if path.is_file():
            files.append(Found(path))
            continue
        if not path.is_dir():
            raise DataError(f"{path} is a pipe, a socket or a device: --input takes files and folders.")
        for inner in sorted(path.rglob("*")):
            refusal = refuse_found(inner, path, follow_links=follow_links)
            if (refusal or inner.is_file()) and not any(part.startswith(".") for part in inner.relative_to(path).parts):
                files.append(Found(inner, refusal))
    if not files:
        raise DataError(f"there are no files under {', '.join(inputs)}. Give --input files, or folders that hold some.")
    return files


@dataclass
class _Started:
    """A piece of work under way: its file, and which piece of it, both counted."""

    file: int
    piece: int
    work: WorkItem


@dataclass
class WorkPlan:
    """The work of one run in its order, and how far it has come. A caption goes with its image or recording."""

    found: Sequence[Found]
    share: Share
    num_done: int = 0
    done_bytes: int = 0
    _next: tuple[int, int] = (0, 0)  # (file, piece) that is not finished
    _started: deque[_Started] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._captions = pair_captions(one.path for one in self.found if not one.refusal)
        shown = set(self._captions.values())
        self.files = [one for one in self.found if one.path not in shown]
        self.sizes = [0 if one.refusal else one.path.stat().st_size for one in self.files]
        total = sum(self.sizes)
        self._from = total * self.share.task // self.share.tasks
        self._until = total * (self.share.task + 1) // self.share.tasks
        self.num_bytes = self._until - self._from

    def work(self) -> Iterator[WorkItem]:
        """Yield what is not done yet, file after file: files are cut as they are reached."""
        first_file, first_piece = self._next
        before = 0
        for number, (found, size) in enumerate(zip(self.files, self.sizes)):
            # A file of no bytes begins where the next one does, so the last share takes what begins at its end.
            is_last = self.share.task + 1 == self.share.tasks
            if number >= first_file and before <= self._until and before + size >= self._from:
                for piece, item in enumerate(self._cut(found)):
                    begins = before + item.start
                    is_own = self._from <= begins and (begins < self._until or is_last)
                    if is_own and (number, piece) >= (first_file, first_piece):
                        self._started.append(_Started(number, piece, item))
                        yield item
            before += size

    def _cut(self, found: Found) -> Iterable[WorkItem]:
        if found.refusal:
            return [WorkItem(found.path, refusal=found.refusal, size=0)]
        return cut_file(found.path, caption=self._captions.get(found.path))

    def finish(self, item: WorkItem) -> bool:
        """Note that `item`, a piece of work or the next part of one, is done; return whether the piece is."""
        if not item.ends:
            return False
        started = self._started.popleft()
        self._next = (started.file, started.piece + 1)
        self.num_done += 1
        self.done_bytes += started.work.num_bytes
        return True

    def progress(self) -> dict[str, int]:
        """Return what `restore` takes."""
        return {"file": self._next[0], "piece": self._next[1], "done": self.num_done, "bytes": self.done_bytes}

    def restore(self, progress: dict[str, int] | None) -> None:
        """Go on where an earlier run was at `progress`."""
        if progress is not None:
            self._next = (progress["file"], progress["piece"])
            self.num_done, self.done_bytes = progress["done"], progress["bytes"]


def _resume_key(plan: WorkPlan, tokenizer: TextTokenizer, skip_bad: bool, options: Options) -> str:
    """Return what is the same for two runs only if they write the same bytes."""
    files = [
        (str(one.path), size, one.refusal or one.path.stat().st_mtime_ns) for one, size in zip(plan.files, plan.sizes)
    ]
    settings = [
        asdict(tokenizer.info),
        tokenizer.engine,
        skip_bad,
        asdict(options) | {"geometries": {name: own.model_dump() for name, own in options.geometries.items()}},
        asdict(plan.share),
        work_items.LINES_BYTES,
    ]
    return hashlib.sha256(json.dumps([files, settings]).encode()).hexdigest()


def _make_task(
    tokenizer_path: str, engine: Engine, options: Options
) -> "Callable[[WorkItem], Encoded | Cut[WorkItem] | str]":
    """Return what a worker does with each piece of work; it loads the tokenizer once."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = TextTokenizer(tokenizer_path, engine=engine)

    def read_and_encode(work: WorkItem) -> Encoded | Cut[WorkItem] | str:
        try:
            if work.kind == kinds.JSONL:
                return encode_lines(work, tokenizer, options)
            reading = read_work(work, options)
            if isinstance(reading, Cut):
                return reading
            documents, rejections = reading
            encoded, failed = encode_documents(documents, tokenizer, options, place=_place(work))
        except EncodingMismatch as error:  # not a rejection: it ends the run
            return str(error)
        return EncodedBatch.of(encoded), [*rejections, *failed]

    return read_and_encode


def _first_bad(rejections: Sequence[Rejection]) -> str:
    if not rejections:
        return ""
    path, reason = line(rejections[0].path), line(rejections[0].reason)
    return f"{path}: {reason.rstrip('.')}. Mend it, or leave out what cannot be read with --bad-input skip."
