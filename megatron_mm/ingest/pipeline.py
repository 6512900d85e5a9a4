"""Preprocessing: paths in, shards out, over several worker processes, every input accounted for."""

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_mm.errors import DataError
from megatron_mm.ingest.detect import KIND_OF_SUFFIX, Kind
from megatron_mm.ingest.document import Rejection, TextSegment
from megatron_mm.ingest.encode import encode_document
from megatron_mm.ingest.work import DEFAULTS, Options, Work, cut_file, cut_work, read_work
from megatron_mm.ingest.workers import Failure, Workers
from megatron_mm.shards import Counts, EncodedDocument, ShardWriter
from megatron_mm.tokenizer import TextTokenizer


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
    options: Options = DEFAULTS,
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
        make_task = functools.partial(_make_task, tokenizer_path, options)
        with progress, Workers(workers, make_task, split=cut_work) as pool:
            for item, result in pool.run(work):
                failed = isinstance(result, Failure)
                documents, rejected = ([], [Rejection(str(item.path), result.reason)]) if failed else result
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
        documents, rejections = read_work(item, DEFAULTS)
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
        yield from cut_file(file, caption=captions.get(file))


def _captions(files: Sequence[Path]) -> dict[Path, Path]:
    """Pair each image and recording with the text file of the same name beside it (WebDataset's convention)."""
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    media = (file for file in files if KIND_OF_SUFFIX.get(file.suffix.lower()) in (Kind.IMAGE, Kind.AUDIO))
    return {file: texts[file.with_suffix("")] for file in media if file.with_suffix("") in texts}


Encoded = tuple[list[EncodedDocument], list[Rejection]]


def _make_task(tokenizer_path: str, options: Options) -> Callable[[Work], Encoded]:
    """Return what a worker does with each piece of work; it loads the tokenizer once."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = TextTokenizer(tokenizer_path)

    def read_and_encode(work: Work) -> Encoded:
        documents, rejections = read_work(work, options)
        seconds = options.max_audio_seconds
        return [encode_document(document, tokenizer, max_audio_seconds=seconds) for document in documents], rejections

    return read_and_encode


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
