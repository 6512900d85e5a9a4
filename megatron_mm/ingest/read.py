"""Any file to documents: the kind decides who reads it, and what cannot be read becomes a rejection."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mm.errors import DataError
from megatron_mm.ingest import account, kinds, layouts
from megatron_mm.ingest.archive import MAX_DEPTH, decompress, unpack
from megatron_mm.ingest.charset import NoText
from megatron_mm.ingest.detect import MAX_FILE_BYTES, detect, mime_of
from megatron_mm.ingest.document import (
    NOWHERE,
    AudioSegment,
    Document,
    Reading,
    Rejection,
    TextSegment,
    unexpected,
)
from megatron_mm.ingest.dumps import read_dump
from megatron_mm.ingest.fields import DEFAULTS, Schemas
from megatron_mm.ingest.gutenberg import read_book
from megatron_mm.ingest.kinds import Kind, Parts
from megatron_mm.ingest.mail import read_mail
from megatron_mm.ingest.mailbox import read_messages
from megatron_mm.ingest.record import read_record
from megatron_mm.ingest.records import element_ranges, read_elements, read_lines, read_rows, read_table
from megatron_mm.ingest.sidecars import read_beside
from megatron_mm.ingest.table_rows import Table
from megatron_mm.ingest.timed import read_film, read_recording
from megatron_mm.ingest.warc import read_warc
from megatron_mm.ingest.workers import restart_limits

CONTAINERS = frozenset(
    {
        *(".tfrecord", ".tfrecords", ".npz", ".npy", ".pkl", ".pickle", ".pt", ".pth", ".h5", ".hdf5", ".mds", ".avro"),
        *(".orc", ".msgpack", ".lmdb", ".mdb", ".sqlite", ".sqlite3", ".db", ".rar", ".7z", ".cab", ".iso", ".beton"),
        *(".safetensors", ".mat", ".rec"),
    }
)
"""Names of files that hold other things and are not opened: a line about one would be no document."""


@dataclass(frozen=True)
class Reader:
    """How files are read; `depth` counts the archives that one was unpacked from."""

    trust_content: bool = False
    """Read a file whose name says another kind as what its content is."""
    schemas: Schemas = DEFAULTS
    layout: str = ""
    """The one layout that archives are read by, if one was named."""
    depth: int = 0

    def read(
        self, path: Path, *, beside: Sequence[Path] = (), table: Table | None = None, kind: Kind | None = None
    ) -> Reading:
        """Return the documents of a file; what files `beside` it say of it is read with it.

        `kind` says what it is, if that is known. Never raises for what is in the file: what cannot be read is a
        rejection.
        """
        known, kind = kind, kinds.UNKNOWN
        try:
            if table is not None:
                with account.kept_if_whole():
                    return read_table(path, table, self.schemas, start=0, stop=table.num_rows)
            kind = known or detect(path, trust_content=self.trust_content)
            if not kind.unbounded and path.stat().st_size > MAX_FILE_BYTES:
                raise DataError(f"it has {path.stat().st_size:,} bytes, and {kind.words} files are read up to 1 GiB")
            with account.kept_if_whole():
                if kind in CONTAINERS_OF:
                    return CONTAINERS_OF[kind](self, path)
                document, rejections = self._document(path, kind, beside)
        except NoText as error:
            if kind not in EMPTY:
                return self._rejected(path, kind, str(error))
            account.count(account.INPUTS, kind.words)
            account.count(account.OTHERS, EMPTY[kind])
            return [], []
        except (DataError, OSError) as error:
            return self._rejected(path, kind, str(error))
        except RecursionError:
            return self._rejected(path, kind, "it is nested too deeply")
        except MemoryError:
            raise
        except Exception as error:  # libraries raise what they like of a damaged file
            return self._rejected(path, kind, unexpected(error))
        account.count(account.INPUTS, kind.words)
        return [document], [replace(one, is_part=True) for one in rejections]

    def _rejected(self, path: Path, kind: Kind, reason: str) -> Reading:
        account.count(account.INPUTS, kind.words)
        return [], [Rejection(str(path), reason)]

    def _document(self, path: Path, kind: Kind, beside: Sequence[Path]) -> tuple[Document, list[Rejection]]:
        if kind == kinds.MAIL:
            segments, rejections = self._read_mail(path)
            return Document(segments, kind.source), rejections
        if kind == kinds.GUTENBERG:
            return read_book(path), []
        media = [file for file in beside if layouts.is_captioned(file)]
        said = read_beside(path, [file for file in beside if file not in media], self.schemas)
        if said.record is not None:
            with_medium = said.record | {kinds.by_suffix(path).words: path.name}
            document = read_record(with_medium, path.parent, self.schemas)
            return document, []
        if said.cues and kind == kinds.VIDEO:
            segments, rejections = read_film(path, said.cues)
            return Document(segments, kind.source), rejections
        segments, rejections = kind.read(path)
        if said.cues and isinstance(segments[0], AudioSegment):
            segments = read_recording(segments[0], said.cues)
        for other in media:
            more, left_out = detect(other, trust_content=self.trust_content).read(other)
            segments, rejections = [*segments, *more], [*rejections, *left_out]
        return Document([*segments, *said.segments], kind.source, said.origin or NOWHERE), rejections

    def read_archive(self, path: Path, *, start: int = 0, stop: int | None = None) -> Reading:
        """Return the documents of the files in an archive; of a tar, of those whose header lies in bytes [start, stop).

        Raises DataError if it is damaged, holds too much or is nested too deeply.
        """
        inner = self._deeper("archives are")
        also = (path.parent, path.parent / "images", path.parent.parent / "images")
        inner = replace(inner, schemas=replace(self.schemas, also=also))
        with tempfile.TemporaryDirectory(prefix="archive-") as folder:
            files, rejections = unpack(path, Path(folder), start=start, stop=stop)
            account.count(account.INPUTS, "members of archives", len(rejections))
            found = [layouts.Found(file) for file in files]
            arranged = layouts.arrange(found, only=self.layout, of_archive=True)
            for one in arranged.aside:
                account.count(account.SET_ASIDE, one.what)
            documents: list[Document] = []
            for entry in arranged.entries:
                restart_limits()  # they are those of a document, and not of all that are packed with it
                if entry.refusal:
                    read, rejected = self._rejected(entry.path, kinds.UNKNOWN, entry.refusal)
                else:
                    read, rejected = inner.read(entry.path, beside=entry.beside, table=entry.table)
                documents += [_of_member(document, entry.path, folder) for document in read]
                rejections += rejected
        if not files and not rejections and stop is None:
            raise DataError("the archive is empty")
        return documents, _within(path, folder, rejections)

    def _read_compressed(self, path: Path) -> Reading:
        inner = self._deeper("archives are")
        with tempfile.TemporaryDirectory(prefix="archive-") as folder:
            target = Path(folder) / (path.stem if path.suffix.lower() != ".tgz" else f"{path.stem}.tar")
            decompress(path, target)
            documents, rejections = inner.read(target)
        return documents, _within(path, folder, rejections)

    def _read_mail(self, path: Path) -> Parts:
        inner = self._deeper("messages and archives are")
        with tempfile.TemporaryDirectory(prefix="mail-") as folder, account.of_one_input():
            return read_mail(path, folder=Path(folder), read_attached=inner.read)

    def read_mailbox(self, path: Path, *, start: int = 0, stop: int | None = None) -> Reading:
        """Return the messages of a mailbox that begin in bytes [start, stop). Raises DataError if there is none."""
        inner = self._deeper("messages and archives are")
        return read_messages(path, read=lambda file: inner.read(file, kind=kinds.MAIL), start=start, stop=stop)

    def _deeper(self, what: str) -> "Reader":
        if self.depth == MAX_DEPTH:
            raise DataError(f"{what} nested more than {MAX_DEPTH} deep")
        return replace(self, depth=self.depth + 1)

    def _read_array(self, path: Path) -> Reading:
        documents: list[Document] = []
        rejections: list[Rejection] = []
        for start, stop, first in element_ranges(path, num_bytes=path.stat().st_size):
            read, rejected = read_elements(path, start=start, stop=stop, first_element=first, schemas=self.schemas)
            documents += read
            rejections += rejected
        return documents, rejections


EMPTY = {
    kinds.TEXT: "files of white space",
    kinds.LATEX: "files of LaTeX that hold nothing but comments",
    kinds.NOTEBOOK: "notebooks that hold nothing",
}
"""Files without text that are no mistake of anyone, and what they are counted as."""

CONTAINERS_OF = {
    kinds.JSONL: lambda reader, path: read_lines(path, schemas=reader.schemas),
    kinds.PARQUET: lambda reader, path: read_rows(path, schemas=reader.schemas),
    kinds.ARROW: lambda reader, path: read_rows(path, schemas=reader.schemas),
    kinds.JSON_ARRAY: Reader._read_array,
    kinds.ARCHIVE: Reader.read_archive,
    kinds.COMPRESSED: Reader._read_compressed,
    kinds.WIKI: lambda reader, path: read_dump(path, kinds.WIKI),
    kinds.POSTS: lambda reader, path: read_dump(path, kinds.POSTS),
    kinds.WARC: lambda reader, path: read_warc(path),
    kinds.MAILBOX: Reader.read_mailbox,
}
"""Who reads files that hold several documents."""


def read_file(path: Path, *, beside: Sequence[Path] = (), trust_content: bool = False) -> Reading:
    """Return the documents of a file as `Reader.read` does."""
    return Reader(trust_content=trust_content).read(path, beside=beside)


def describe(path: Path) -> Parts:
    """Return what can be said of a file that cannot be read: its metadata. Raises DataError for containers."""
    if path.suffix.lower() in CONTAINERS or path.name.lower().endswith(tuple(CONTAINERS)):
        raise DataError(
            f"it is named as a container ({path.suffix}), and such are not opened: write what is in it out as JSON "
            "lines, Parquet or tars"
        )
    return [TextSegment(f"{path.name}: {mime_of(path)}, {path.stat().st_size:,} bytes\n")], []


def _of_member(document: Document, path: Path, folder: str) -> Document:
    member = str(path.relative_to(folder))
    inner = f"{member}/{document.origin.member}" if document.origin.member else member
    return replace(document, origin=replace(document.origin, member=inner))


def _within(path: Path, folder: str, rejections: list[Rejection]) -> list[Rejection]:
    """Name what was unpacked to `folder` by the archive that it came from."""
    return [replace(entry, path=entry.path.replace(folder, str(path), 1)) for entry in rejections]
