"""The kinds of file that are read: another one is its reader, a file of this folder, and one line here."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from megatron_mm.ingest.document import Rejection, Segment
from megatron_mm.source import Source

Parts = tuple[list[Segment], list[Rejection]]
"""The segments of a file, and what was left out of it."""


@dataclass(frozen=True)
class Kind:
    """How files of a kind are told from others, and who reads them."""

    words: str
    """What a message calls it."""
    source: Source
    """What its documents are counted as."""
    suffixes: tuple[str, ...] = ()
    """What its files are named, in lower case."""
    mimes: tuple[str, ...] = ()
    """What libmagic takes them for; one that ends in / is the beginning of several."""
    reader: str = ""
    """'module.function' of this folder: from the path of a file to its `Parts`. Without one, a kind whose files hold
    several documents, which `read_file` knows."""
    textual: bool = False
    """All text inside: only the name tells it from other kinds of which that is true."""
    captioned: bool = False
    """Whether its text may stand in a file of the same name beside it."""
    unbounded: bool = False
    """Read in parts, so that a file may have any size."""

    @property
    def read(self) -> Callable[[Path], Parts]:
        """The reader, whose libraries are loaded now: up to half a second, which runs over plain text are spared."""
        module, _, function = self.reader.partition(".")
        return getattr(import_module(f"megatron_mm.ingest.{module}"), function)


TEXT = Kind(
    words="text",
    source=Source.TEXT,
    suffixes=(".txt", ".text", ".md", ".markdown", ".rst", ".csv", ".tsv", ".json", ".xml"),
    mimes=("text/", "application/json", "application/xml", "application/javascript", "image/svg+xml"),
    reader="text.read_plain",
    textual=True,
)
LATEX = Kind(
    words="LaTeX",
    source=Source.TEXT,
    suffixes=(".tex", ".ltx", ".latex"),
    mimes=("text/x-tex",),
    reader="latex.read_paper",
    textual=True,
)
HTML = Kind(
    words="web page",
    source=Source.TEXT,
    suffixes=(".html", ".htm", ".xhtml"),
    mimes=("text/html", "application/xhtml+xml"),
    reader="text.read_html",
    textual=True,
)
JSONL = Kind(
    words="JSON lines",
    source=Source.TEXT,
    suffixes=(".jsonl", ".ndjson"),
    mimes=("application/x-ndjson",),
    textual=True,
    unbounded=True,
)
NOTEBOOK = Kind(
    words="notebook", source=Source.TEXT, suffixes=(".ipynb",), reader="notebook.read_notebook", textual=True
)
GUTENBERG = Kind(words="book of Project Gutenberg", source=Source.TEXT, textual=True)
"""Text files, which their first lines tell from others."""
MAILBOX = Kind(
    words="mailbox",
    source=Source.OFFICE,
    suffixes=(".mbox", ".mbx"),
    mimes=("application/mbox",),
    textual=True,
    unbounded=True,
)
MAIL = Kind(words="e-mail", source=Source.OFFICE, suffixes=(".eml",), mimes=("message/rfc822",), textual=True)
IMAGE = Kind(
    words="image",
    source=Source.IMAGE,
    suffixes=(
        *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
        *(".heic", ".heif", ".avif", ".jp2"),
    ),
    mimes=("image/",),
    reader="image.read_image_file",
    captioned=True,
)
AUDIO = Kind(
    words="audio",
    source=Source.AUDIO,
    suffixes=(".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma", ".sph"),
    mimes=("audio/",),
    reader="audio.read_audio_file",
    captioned=True,
)
VIDEO = Kind(
    words="video",
    source=Source.VIDEO,
    suffixes=(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv"),
    mimes=("video/",),
    reader="video.read_video",
    captioned=True,
)
PDF = Kind(words="PDF", source=Source.PDF, suffixes=(".pdf",), mimes=("application/pdf",), reader="pdf.read_pdf")
OFFICE = Kind(
    words="office document",
    source=Source.OFFICE,
    suffixes=(".docx", ".pptx", ".xlsx", ".odt", ".ods", ".odp", ".epub"),
    reader="office.read_office",
)
LEGACY = Kind(
    words="office document of before 2007",
    source=Source.OFFICE,
    mimes=("application/msword", "application/vnd.ms-excel", "application/vnd.ms-powerpoint", "text/rtf"),
    reader="legacy.read_legacy",
)
"""Its names, doc, xls, ppt and rtf, are often given to text and web pages too, so they say nothing."""
PARQUET = Kind(
    words="Parquet",
    source=Source.TEXT,
    suffixes=(".parquet",),
    mimes=("application/vnd.apache.parquet",),
    unbounded=True,
)
ARROW = Kind(words="Arrow", source=Source.TEXT, suffixes=(".arrow", ".feather"), unbounded=True)
JSON_ARRAY = Kind(words="JSON array", source=Source.TEXT)
"""An array of records; only its content tells it from other JSON, which is text."""
ARCHIVE = Kind(
    words="archive", source=Source.TEXT, suffixes=(".tar", ".zip"), mimes=("application/x-tar",), unbounded=True
)
COMPRESSED = Kind(
    words="compressed file",
    source=Source.TEXT,
    suffixes=(".gz", ".tgz", ".bz2", ".xz", ".zst"),
    mimes=("application/gzip", "application/x-bzip2", "application/zstd", "application/x-xz"),
    unbounded=True,
)
WARC = Kind(
    words="web archive (WARC)",
    source=Source.TEXT,
    suffixes=(".warc", ".wet", ".wat"),
    mimes=("application/warc",),
    unbounded=True,
)
"""Most are compressed, and named as that."""
WIKI = Kind(words="MediaWiki dump", source=Source.TEXT, unbounded=True)
POSTS = Kind(words="dump of posts (Stack Exchange)", source=Source.TEXT, unbounded=True)
"""Dumps of records in XML; only their content tells them from other XML, which is text."""
UNKNOWN = Kind(words="unknown", source=Source.TEXT, reader="read.describe")

KINDS = tuple(value for value in list(globals().values()) if isinstance(value, Kind))
"""All of the above."""


def by_suffix(path: Path) -> Kind | None:
    """Return the kind that a file is named as, None if its name says none."""
    return _BY_SUFFIX.get(path.suffix.lower())


def by_mime(mime: str) -> Kind | None:
    """Return the kind that libmagic's name of a file stands for, None if there is none."""
    return _BY_MIME.get(mime) or _BY_MIME.get(f"{mime.partition('/')[0]}/")


_BY_SUFFIX = {suffix: kind for kind in KINDS for suffix in kind.suffixes}
_BY_MIME = {mime: kind for kind in KINDS for mime in kind.mimes}
