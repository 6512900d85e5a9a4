"""What comes from outside (names, records, errors of libraries) made fit for a terminal and a log.

A line feed in the name of a file would forge a line of the log, an escape sequence would recolour, retitle or clear the
terminal. So every line that this package writes itself begins at the left, and what continues it is set in by two
spaces: `message` keeps a line feed before two spaces, which our lists have, and shows every other one as \\n.
"""

import contextlib
import io
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

UNSAFE = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
"""Controls of C0 and C1, what turns the direction of text or ends a line, and halves of surrogate pairs: what stands
for a byte of a file's name that is no UTF-8 is one."""
_ANY = re.compile(f"[{UNSAFE}]")
_BUT_LISTS = re.compile(rf"\n(?!  )|(?!\n)[{UNSAFE}]")
_BUT_LINES = re.compile(rf"(?![\n\t])[{UNSAFE}]")


def line(value: object) -> str:
    """Return a value, as the name of a file, on one line and without any control: these are shown as in source code."""
    return _ANY.sub(_escape, str(value))


def message(text: str) -> str:
    """Return a message without controls, but for the line feeds before two spaces, which our lists have."""
    return text if isinstance(text, Shown) else _BUT_LISTS.sub(_escape, text)


def content(text: str) -> str:
    """Return a document, or what a model has written, without controls but its line ends and tabs."""
    return _BUT_LINES.sub(_escape, text)


class Shown(str):
    """A message that is fit already, with line ends that `message` would not have."""


def traced(error: BaseException) -> Shown:
    """Return the traceback of an exception as Python writes it, but for what stands in the exception itself."""
    parts = traceback.TracebackException.from_exception(error).format()
    return Shown("\n".join(message(part.strip("\n")) for part in parts))


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


class Formatter(logging.Formatter):
    """Writes a record so that nothing in it can pass for another record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        text = message(super().formatMessage(_with_message(record)))
        error = record.exc_info[1] if record.exc_info else None
        return text if error is None else f"{text}\n{traced(error)}"


def _with_message(record: logging.LogRecord) -> logging.LogRecord:
    record.message = record.getMessage().rstrip("\n")
    return record


def set_up_logging(*, prefix: str = "") -> None:
    """Let the log, and the warnings of Python, go to stderr a record a line, `prefix` before each."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(f"{prefix}%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.captureWarnings(True)


class _Guarded:
    """A stream that lets no control pass but line ends, tabs, and the return that begins a progress bar."""

    def __init__(self, stream: TextIO, *, has_bars: bool) -> None:
        self._stream, self._has_bars = stream, has_bars

    def write(self, text: str) -> int:
        """Write `text`."""
        start = len(text) - len(text.lstrip("\r")) if self._has_bars else 0
        self._stream.write(text[:start] + content(text[start:]))
        return len(text)

    def writelines(self, texts: Any) -> None:
        """Write all of `texts`."""
        for text in texts:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Let whatever is printed while this is open, by whomever, pass `content`: the last guard behind all others."""
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: of an encoding that has not all characters
    sys.stdout = _Guarded(before[0], has_bars=False)  # type: ignore[assignment]
    sys.stderr = _Guarded(before[1], has_bars=True)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
