"""Schemas: which columns of a record are its text, its media or its conversation."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from megatron_mm.errors import ConfigError, DataError
from megatron_mm.ingest.conversations import ChatTemplate
from megatron_mm.ingest.media_values import MEDIA

BUILT_IN = Path(__file__).with_name("fields.yaml")
MEDIA_NAMES = frozenset(
    {
        *("image", "images", "img", "jpg", "png", "webp", "audio", "audios", "audio_filepath", "wav", "flac", "mp3"),
        *("opus", "video", "videos", "mp4", "webm"),
    }
)
"""Columns that are media by their names: a record that fills one that no schema reads is refused."""
FILE_NAMES = ("file_name", "image_file_name", "audio_file_name", "video_file_name")
LISTS_OF_FILE_NAMES = tuple(f"{name}s" for name in FILE_NAMES)
"""Columns that Hugging Face's folders of media name files by: they are media only if the suffix says so."""
MEDIA_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".wav", ".flac", ".mp3", ".ogg", ".opus"),
    *(".m4a", ".mp4", ".mkv", ".webm", ".avi", ".mov"),
)
IMAGES = "images"
"""A folder beside records in which their files are looked for too: LLaVA's lists name images from there."""
ADDRESS_COLUMNS = ("url", "URL", "image_url", "img_url", "video_url", "audio_url")
SIZE_COLUMNS = {"width", "height", "WIDTH", "HEIGHT", "image_phash", "phash", "similarity", "clip_similarity_vitb32"}
"""Columns that tables of pictures' addresses have beside the address, and tables of web pages have not."""


def _names(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_names)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Strict):
    """One thing of a record, in its place: of several names the first that the record fills counts."""

    text: Names = []
    image: Names = []
    audio: Names = []
    video: Names = []
    media: Names = []
    """Files whose suffix says which of these they are; other files that the columns name are left alone."""
    start: Names = []
    """The second of a recording at which it is cut out of its file; none: its first."""
    seconds: Names = []
    """How long it is; none: all that follows."""
    cues: Names = []
    """A list of words with the seconds between which a recording says them: each is laid where it ends."""
    conversation: Names = []
    """Turns, as `{from, value}` or `{role, content}`; media where `<image>` and the like stand in them, or before."""
    interleaved: Names = []
    """Two lists of one length, texts and images, in each place one or the other; or turns and the images before."""
    matched: Names = []
    """A list of texts, and one of images with the number of the text that each belongs to."""
    segments: Names = []
    """A list of records in reading order."""
    folder: str = ""
    """The folder of files that are named, from that of the records."""
    suffix: str = ""
    """What their names lack at the end."""

    @property
    def names(self) -> set[str]:
        """Every column that this part may read."""
        lists = (self.text, self.image, self.audio, self.video, self.media, self.start, self.seconds, self.cues)
        more = (self.conversation, self.interleaved, self.matched, self.segments)
        return {name for names in (*lists, *more) for name in names}


class Fields(_Strict):
    """A schema: which columns a record must have, what it becomes, and columns that are left out on purpose."""

    name: str = "your own"
    needs: list[Names] = []
    parts: list[Part]
    ignore: Names = []
    """Columns that may hold media, or anything, and are left out."""

    def fits(self, columns: set[str]) -> bool:
        """Tell whether records with these columns are of this schema."""
        return all(not columns.isdisjoint(names) for names in self.needs)

    @functools.cached_property
    def columns(self) -> frozenset[str]:
        """Every column that the schema may read."""
        return frozenset(name for part in self.parts for name in part.names)

    def declaring(self, media: Mapping[str, str]) -> "Fields":
        """Return this with columns that a file declares to be media, by kind: first, or in its conversation."""
        new = {name: kind for name, kind in media.items() if name not in self.columns}
        parts = list(self.parts)
        talk = next((number for number, part in enumerate(parts) if part.conversation), None)
        if talk is None:
            parts = [*(Part.model_validate({kind: name}) for name, kind in new.items()), *parts]
        else:
            more = {kind: [name for name, own in new.items() if own == kind] for kind in MEDIA}
            lists = {kind: [*getattr(parts[talk], kind), *names] for kind, names in more.items()}
            parts[talk] = parts[talk].model_copy(update=lists)
        return Fields(name=self.name, needs=self.needs, parts=parts, ignore=self.ignore)


def load_fields(path: Path) -> tuple[Fields, ...]:
    """Return the schemas of a YAML file: one, or a list of them. Raises ConfigError."""
    try:
        value = yaml.safe_load(path.read_text())
        return tuple(TypeAdapter(list[Fields]).validate_python(value if isinstance(value, list) else [value]))
    except OSError as error:
        raise ConfigError(f"--fields {path} cannot be read: {error.strerror}. Give a YAML file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--fields {path} is not YAML: {error}") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(f"--fields {path}: {wrong}. docs/corpora.md shows what it may say.") from error


@functools.cache
def built_in() -> tuple[Fields, ...]:
    """Return the schemas of fields.yaml."""
    return load_fields(BUILT_IN)


def is_known(record: Mapping[str, Any]) -> bool:
    """Tell whether a record is one of text or media by the names of its fields: other JSON is settings, or data."""
    columns = set(record)
    fields = next(fields for fields in built_in() if fields.fits(columns))
    return not fields.columns.isdisjoint(columns)


MAX_SHAPES = 1_000
"""Sets of columns whose schema is remembered."""


OTHER_FIELDS = (
    MEDIA_NAMES
    | set(LISTS_OF_FILE_NAMES)
    | SIZE_COLUMNS
    | {name for fields in built_in() for names in fields.needs for name in names if name != "text"}
)
"""Fields of a line that make it more than text, or text in another order."""


def is_plain(record: Mapping[str, Any]) -> bool:
    """Tell whether a record has text and nothing that is, or names, media: the bulk of most corpora."""
    if not OTHER_FIELDS.isdisjoint(record):
        return False
    text = record.get("text")
    if type(text) is not str or not text or text.isspace():
        return False
    return not any(type(value) is str and value[-5:].lower().endswith(MEDIA_SUFFIXES) for value in record.values())


@dataclass(frozen=True)
class Schemas:
    """The schemas that records are read by, those of the user first; and how conversations are written."""

    own: tuple[Fields, ...] = ()
    also: tuple[Path, ...] = ()
    """Folders in which files are looked for that are not in that of the records."""
    template: ChatTemplate | None = None
    """What conversations are written by; without one they are plain text."""
    declared: Mapping[str, str] = field(default_factory=dict)
    """Columns that the file of the records declares to be media, by kind."""

    @functools.cached_property
    def known(self) -> tuple[Fields, ...]:
        """Every schema, in the order in which they are tried; the user's say by themselves what is media."""
        known = built_in()
        return (*self.own, *(tuple(one.declaring(self.declared) for one in known) if self.declared else known))

    def fingerprint(self) -> Any:
        """Return, as JSON, what differs if documents may."""
        return [
            [fields.model_dump() for fields in self.own],
            None if self.template is None else self.template.fingerprint(),
        ]

    def of(self, record: Mapping[str, Any]) -> Fields:
        """Return the schema of a record: by the columns that it fills."""
        columns = tuple([name for name, value in record.items() if value is not None])
        if columns not in self._by_columns:
            if len(self._by_columns) == MAX_SHAPES:
                self._by_columns.clear()
            self._by_columns[columns] = next(fields for fields in self.known if fields.fits(set(columns)))
        return self._by_columns[columns]

    @functools.cached_property
    def _by_columns(self) -> dict[tuple[str, ...], Fields]:
        """The schema of the records with some columns that came: most files have few such."""
        return {}

    def check_columns(self, columns: Sequence[str]) -> None:
        """Pass if records with these columns can be documents. Raises DataError for tables of pictures' addresses."""
        there = set(columns)
        fields = next(fields for fields in self.known if fields.fits(there))
        has_media = not (fields.columns & there).isdisjoint(MEDIA_NAMES)
        if not has_media and there & SIZE_COLUMNS and not there.isdisjoint(ADDRESS_COLUMNS):
            raise DataError(ADDRESSES_ONLY)
        if there.isdisjoint(fields.columns):
            raise DataError(f"its columns are {list(columns)}, and none is known to be text or media. {HOW_TO_NAME}")


HOW_TO_NAME = "Say which columns are what with --fields"
ADDRESSES_ONLY = (
    "it has the addresses of images and not the images, and nothing is fetched. Download them with img2dataset, and "
    "give what that writes to --input"
)
DEFAULTS = Schemas()
