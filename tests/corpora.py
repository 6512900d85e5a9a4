"""Reading a folder as the preprocessing tool does, in this process."""

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm.ingest import account
from megatron_mm.ingest.account import Account
from megatron_mm.ingest.document import AudioSegment, Document, Rejection, TextSegment
from megatron_mm.ingest.find import find_files
from megatron_mm.ingest.plan import EVERYTHING, WorkPlan
from megatron_mm.ingest.work_items import DEFAULTS, Options, read_all
from megatron_mm.modalities.audio.spec import SAMPLE_RATE, encode_flac


@dataclass
class Corpus:
    """What became of a folder."""

    files: dict[str, Any]
    documents: list[Document] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    account: Account = field(default_factory=dict)

    @property
    def shapes(self) -> list[list[str]]:
        """Each document: its texts, and what its other segments are."""
        return [shape(document) for document in self.documents]

    @property
    def reasons(self) -> list[str]:
        """Why things were rejected."""
        return [one.reason for one in self.rejections]


def shape(document: Document) -> list[str]:
    """Return the texts of a document, and what its other segments are; of recordings, their seconds."""
    return [_shown(part) for part in document.segments]


def _shown(part: Any) -> str:
    if isinstance(part, TextSegment):
        return part.text
    seconds = f" {part.num_samples / SAMPLE_RATE:g}" if isinstance(part, AudioSegment) else ""
    return f"<{part.modality}{seconds}>"


class Serial:
    """Workers without processes of their own."""

    def __init__(self, count: int, make_task: Callable[[], Callable[[Any], Any]], **_: Any) -> None:
        self.task = make_task()

    def __enter__(self) -> "Serial":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, work: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        return ((item, self.task(item)) for item in work)


def read_corpus(folder: Path, options: Options = DEFAULTS, **find: Any) -> Corpus:
    """Read everything below a folder; fails unless inputs are documents, rejections and what is no document."""
    plan = WorkPlan(find_files([str(folder)], **find), EVERYTHING, layout=options.layout)
    corpus = Corpus(plan.files())
    for item in plan.work():
        with account.collected() as counted:
            for documents, rejections in read_all(item, options):
                corpus.documents += documents
                corpus.rejections += rejections
        account.add(corpus.account, counted)
    rejected = sum(not one.is_part for one in corpus.rejections)
    assert not account.imbalance(corpus.account, documents=len(corpus.documents), rejected=rejected)
    return corpus


def flac(seconds: float) -> bytes:
    """Return a recording of a chirp."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return encode_flac((0.3 * np.sin(2 * np.pi * (300 * time + 100 * time**2))).astype(np.float32))


def tar(files: Mapping[str, bytes | str]) -> bytes:
    """Return a tar of some files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as output:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            output.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def write(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write files below a folder and return it."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder
