"""Preprocessing: paths in, shards out, over several worker processes, every input accounted for."""

import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_mm.errors import DataError
from megatron_mm.ingest.detect import KIND_OF_SUFFIX, Kind
from megatron_mm.ingest.document import Rejection, TextSegment
from megatron_mm.ingest.encode import MAX_AUDIO_SECONDS, encode_document
from megatron_mm.ingest.read import Reading, read_file, read_lines
from megatron_mm.shards import Counts, EncodedDocument, ShardWriter
from megatron_mm.tokenizer import TextTokenizer

LINES_BYTES = 4 * 2**20
"""Bytes of a JSON-lines file that one worker takes at a time."""
AHEAD_PER_WORKER = 4
"""Work items that wait for a worker, each: enough to keep it busy, few enough to bound memory."""


@dataclass(frozen=True)
class Work:
    """What one worker reads at a time: a file, or a range of lines of one."""

    path: Path
    caption: Path | None = None
    """A text file of the same name that belongs to an image or a recording."""
    start: int = 0
    stop: int | None = None
    first_line: int = 1

    @property
    def num_bytes(self) -> int:
        """Bytes that this work reads, for the progress bar."""
        return (self.path.stat().st_size if self.stop is None else self.stop) - self.start


@dataclass(frozen=True)
class Options:
    """How inputs are read."""

    trust_content: bool = False
    """Read a file whose name says another kind as what its content is, instead of rejecting it."""
    max_audio_seconds: int = MAX_AUDIO_SECONDS
    """Longer recordings become several items."""


@dataclass(frozen=True)
class Report:
    """What became of the inputs."""

    counts: Counts
    num_inputs: int
    rejections: Sequence[Rejection]


def preprocess(
    inputs: Sequence[str],
    *,
    output_prefix: str,
    tokenizer_path: str,
    workers: int = 1,
    skip_bad: bool = False,
    options: Options = Options(),
) -> Report:
    """Read every file under `inputs` and write one set of shards; the result does not depend on `workers`.

    What cannot be read is listed in `output_prefix`.rejected.jsonl, with its reason, if `skip_bad`; otherwise the first
    such input ends the run and nothing is written. Raises DataError for that, for a path that does not exist, and if
    nothing is left to write.
    """
    tokenizer = TextTokenizer(tokenizer_path)
    work = list(_work(find_files(inputs)))
    rejections: list[Rejection] = []
    with ShardWriter(output_prefix, tokenizer=tokenizer.info) as writer:
        progress = tqdm(total=sum(item.num_bytes for item in work), unit="B", unit_scale=True, desc="preprocess")
        with progress, _Workers(workers, tokenizer_path, options) as pool:
            for item, (documents, rejected) in pool.run(work):
                for document in documents:
                    writer.add(document)
                rejections += rejected
                if rejected and not skip_bad:
                    raise DataError(_first_bad(rejections))
                progress.update(item.num_bytes)
                progress.set_postfix(documents=writer.counts.documents, rejected=len(rejections), refresh=False)
        if not writer.counts.documents:
            raise DataError(f"none of the {len(work)} inputs gave a document. " + _first_bad(rejections))
        _write_rejections(output_prefix, rejections)
    return Report(writer.counts, len(work), rejections)


def read_texts(inputs: Sequence[str]) -> Iterator[str]:
    """Yield the text of every document under `inputs`, in a fixed order. Raises DataError at the first bad input."""
    for item in _work(find_files(inputs)):
        documents, rejections = _read(item, Options())
        if rejections:
            raise DataError(f"{rejections[0].path}: {rejections[0].reason}")
        for document in documents:
            yield from (segment.text for segment in document.segments if isinstance(segment, TextSegment))


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Return the files under `inputs` in a fixed order; hidden ones are left out.

    Raises DataError if an input does not exist or nothing is found.
    """
    files: list[Path] = []
    for text in inputs:
        path = Path(text)
        if not path.exists():
            raise DataError(f"{path} does not exist: --input takes files and folders.")
        found = [path] if path.is_file() else sorted(inner for inner in path.rglob("*") if inner.is_file())
        files += [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise DataError(f"there are no files under {', '.join(inputs)}.")
    return files


def _work(files: Sequence[Path]) -> Iterator[Work]:
    """Yield what workers read: a caption goes with its image or recording, long JSON-lines files are cut."""
    captions = _captions(files)
    shown = set(captions.values())
    for file in files:
        if file in shown:
            continue
        if KIND_OF_SUFFIX.get(file.suffix.lower()) is Kind.JSONL and file.stat().st_size > LINES_BYTES:
            yield from _line_ranges(file)
        else:
            yield Work(file, caption=captions.get(file))


def _captions(files: Sequence[Path]) -> dict[Path, Path]:
    """Pair each image and recording with the text file of the same name beside it (WebDataset's convention)."""
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    media = (file for file in files if KIND_OF_SUFFIX.get(file.suffix.lower()) in (Kind.IMAGE, Kind.AUDIO))
    return {file: texts[file.with_suffix("")] for file in media if file.with_suffix("") in texts}


def _line_ranges(path: Path) -> Iterator[Work]:
    """Cut a file at line ends into ranges of about LINES_BYTES."""
    with path.open("rb") as file:
        start, line = 0, 1
        while block := file.read(LINES_BYTES):
            block += file.readline()
            yield Work(path, start=start, stop=start + len(block), first_line=line)
            start += len(block)
            line += block.count(b"\n")


class _Workers:
    """Processes that turn work into encoded documents; one that dies takes only its own input with it."""

    def __init__(self, count: int, tokenizer_path: str, options: Options) -> None:
        self.count = max(1, count)
        self.setup = (tokenizer_path, options)

    def __enter__(self) -> "_Workers":
        self._pool = self._start(self.count)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, count: int) -> ProcessPoolExecutor:
        # Spawned, not forked: PDFium and FFmpeg keep state that a fork would copy half-way.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(count, context, initializer=_set_up, initargs=self.setup)

    def run(self, work: Sequence[Work]) -> Iterator[tuple[Work, "Encoded"]]:
        """Yield the result of each piece of work, in the order of `work`."""
        waiting: deque[tuple[Work, Future]] = deque()
        remaining = iter(work)
        while True:
            while len(waiting) < AHEAD_PER_WORKER * self.count and (item := next(remaining, None)) is not None:
                waiting.append((item, self._pool.submit(_do, item)))
            if not waiting:
                return
            item, future = waiting.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                # Whose input it was is not known: everything under way is done again, this item alone.
                result = self._do_alone(item)
                self._pool.shutdown(wait=False)
                self._pool = self._start(self.count)
                waiting = deque((other, self._pool.submit(_do, other)) for other, _ in waiting)
            yield item, result

    def _do_alone(self, item: Work) -> "Encoded":
        with self._start(1) as single:
            try:
                return single.submit(_do, item).result()
            except BrokenProcessPool:
                return [], [Rejection(str(item.path), "the process that read it died")]


Encoded = tuple[list[EncodedDocument], list[Rejection]]
_encode: Callable[[Reading], Encoded]
_options: Options


def _set_up(tokenizer_path: str, options: Options) -> None:
    """Make a new worker ready: it loads the tokenizer once."""
    global _encode, _options
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = TextTokenizer(tokenizer_path)
    _options = options

    def encode(reading: Reading) -> Encoded:
        documents, rejections = reading
        seconds = options.max_audio_seconds
        return [encode_document(document, tokenizer, max_audio_seconds=seconds) for document in documents], rejections

    _encode = encode


def _leave_with_parent() -> None:
    """End this worker when the run that it works for is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _do(work: Work) -> Encoded:
    return _encode(_read(work, _options))


def _read(work: Work, options: Options) -> Reading:
    if work.stop is not None:
        return read_lines(work.path, start=work.start, stop=work.stop, first_line=work.first_line)
    return read_file(work.path, caption=work.caption, trust_content=options.trust_content)


def _first_bad(rejections: Sequence[Rejection]) -> str:
    if not rejections:
        return ""
    first = rejections[0]
    return f"{first.path}: {first.reason}. Mend it, or leave out what cannot be read with --bad-input skip."


def _write_rejections(output_prefix: str, rejections: Sequence[Rejection]) -> None:
    path = Path(f"{output_prefix}.rejected.jsonl")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(asdict(rejection)) + "\n" for rejection in rejections))
    os.replace(partial, path)
