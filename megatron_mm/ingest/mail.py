"""E-mail: the lines that a reader sees of the header, the body with its images in place, then what is attached."""

import email
import email.policy
import re
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from pathlib import Path

from megatron_mm.errors import DataError
from megatron_mm.ingest.document import Reading, Rejection, Segment, TextSegment
from megatron_mm.ingest.text import read_page

HEADERS = ("From", "To", "Cc", "Date", "Subject")
MAX_PARTS = 1000
MAX_NAME = 60
"""Characters kept of the name of what is attached: its end, which says the kind."""


def read_mail(
    path: Path, *, folder: Path, read_attached: Callable[[Path], Reading]
) -> tuple[list[Segment], list[Rejection]]:
    """Return a message as its header, its body, and its attachments in order, and what was left out.

    Attachments are written to `folder`, an empty one, and read by `read_attached`. Raises DataError if there is
    nothing to read.
    """
    message = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
    reader = _MailReader(path, folder, read_attached)
    reader.read(message)
    if not reader.segments:
        raise DataError("the message is empty")
    return reader.segments, reader.rejections


class _MailReader:
    """Collects the segments of a message and of those that it carries."""

    def __init__(self, path: Path, folder: Path, read_attached: Callable[[Path], Reading]) -> None:
        self.path, self.folder, self.read_attached = path, folder, read_attached
        self.segments: list[Segment] = []
        self.rejections: list[Rejection] = []
        self._parts = 0

    def read(self, message: EmailMessage) -> None:
        """Add one message."""
        header = "".join(f"{name}: {message[name]}\n" for name in HEADERS if message[name])
        if header:
            self.segments.append(TextSegment(header + "\n"))
        body = message.get_body(("html", "plain"))
        shown = self._read_body(message, body) if body is not None else set()
        for part in _leaves(message):
            self._parts += 1
            if self._parts > MAX_PARTS:
                raise DataError(f"the message has more than {MAX_PARTS} parts")
            if part.get_content_type() == "message/rfc822":
                self.read(part.get_payload(0))
            elif part is not body and id(part) not in shown and _is_attached(part):
                self._attach(part)

    def _read_body(self, message: EmailMessage, body: EmailMessage) -> set[int]:
        """Add the body; return the ids of the parts that it shows."""
        shown: set[int] = set()
        if body.get_content_subtype() != "html":
            text = _text(body).replace("\r\n", "\n")
            if text.strip():
                self.segments.append(TextSegment(text))
            return shown
        by_id = {f"cid:{(part['Content-ID'] or '').strip('<> ')}": part for part in _leaves(message)}

        def fetch(address: str) -> bytes | None:
            part = by_id.get(address)
            if part is None:
                return None
            shown.add(id(part))
            return part.get_payload(decode=True)

        segments, rejections = read_page(_text(body), name=str(self.path), fetch=fetch)
        self.segments += segments
        self.rejections += rejections
        return shown

    def _attach(self, part: EmailMessage) -> None:
        name = re.sub(r"[\x00-\x1f/\\]+", "_", part.get_filename() or "part").lstrip("._")[-MAX_NAME:] or "part"
        file = self.folder / str(self._parts) / name
        file.parent.mkdir()
        file.write_bytes(part.get_payload(decode=True) or b"")
        documents, rejections = self.read_attached(file)
        for document in documents:
            self.segments += document.segments
        self.rejections += [
            Rejection(rejection.path.replace(str(file), f"{self.path}#{name}"), rejection.reason)
            for rejection in rejections
        ]


def _leaves(message: EmailMessage) -> Iterator[EmailMessage]:
    """Yield the parts of a message that hold something; a message that it carries is one part."""
    for part in message.iter_parts():
        if part.get_content_maintype() == "multipart":
            yield from _leaves(part)
        else:
            yield part


def _is_attached(part: EmailMessage) -> bool:
    """Tell whether a part is a file; the body's other form is none."""
    return part.get_content_maintype() != "text" or part.is_attachment()


def _text(part: EmailMessage) -> str:
    try:
        return part.get_content()
    except (LookupError, UnicodeError) as error:
        raise DataError(f"the message's text cannot be decoded: {error}") from error
