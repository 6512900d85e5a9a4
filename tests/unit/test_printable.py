"""Nothing that comes from outside may forge a line of a log, or reach a terminal as an escape."""

import ast
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_mm
from megatron_mm import endings, printable
from megatron_mm.errors import ConfigError, DataError

FORGED = "step 1200 | loss 0.1"
HOSTILE = (
    f"a\n{FORGED}",
    f"a\r{FORGED}",
    f"a\x85{FORGED}",
    f"a\u2028{FORGED}",
    f"a\x0b{FORGED}",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\x1b[2J",
    "a\u202egnp.exe",
    "a\x08\x7f\x00",
    b"\xff\xfe".decode("utf-8", "surrogateescape"),
)
CONTROL = re.compile(f"[{printable.UNSAFE}]")
ROOT = Path(megatron_mm.__file__).parent


@pytest.mark.parametrize("value", HOSTILE)
def test_a_value_is_one_line_without_controls(value: str) -> None:
    shown = printable.line(value)
    assert not CONTROL.search(shown) and len(shown.splitlines()) == 1
    assert printable.line(shown) == shown
    assert shown.encode()


def test_what_is_harmless_stays() -> None:
    text = "naïve café, 中文, مرحبا, 👩‍👩‍👧, a\\b 'c' $x$"
    assert printable.line(text) == printable.message(text) == printable.content(text) == text
    assert printable.message("the ranks differ:\n  one\n  two") == "the ranks differ:\n  one\n  two"
    assert printable.content("a\n\tb") == "a\n\tb"


@pytest.mark.parametrize("value", HOSTILE)
def test_a_record_of_the_log_forges_no_other(value: str) -> None:
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "%s is damaged:\n  %s", (value, value), None)
    first, *others = printable.Formatter("%(message)s").format(record).split("\n")
    assert first.endswith(" is damaged:") and all(line.startswith("  ") for line in others) and len(others) == 1
    assert not any(CONTROL.search(line) for line in (first, *others))


def test_a_traceback_in_the_log_forges_no_record() -> None:
    try:
        raise ValueError(f"x\n{FORGED}")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "it failed", (), sys.exc_info())
    lines = printable.Formatter("%(message)s").format(record).split("\n")
    assert lines[:2] == ["it failed", "Traceback (most recent call last):"]
    assert lines[-1] == f"ValueError: x\\n{FORGED}" and all(line.startswith("  ") for line in lines[2:-1])


@pytest.mark.parametrize("kind", [ConfigError, DataError, RuntimeError, KeyError])
@pytest.mark.parametrize("value", HOSTILE)
def test_an_error_forges_no_line(value: str, kind: type[Exception], capfd: pytest.CaptureFixture) -> None:
    def command() -> None:
        raise kind(f"{value} is damaged")

    endings.run(command)
    lines = capfd.readouterr().err.removesuffix("\n").split("\n")
    own = ("error: ", "Traceback (most", "  ", f"{kind.__name__}: ", "This is a defect of megatron_mm")
    assert all(line.startswith(own) for line in lines)
    assert not any(CONTROL.search(line) for line in lines)


def test_whatever_is_printed_holds_no_escape(capsys: pytest.CaptureFixture) -> None:
    def command() -> None:
        for value in HOSTILE:
            print(value)
            print(value, file=sys.stderr)
        print("\r50%", end="", file=sys.stderr)  # as a progress bar begins

    assert endings.run(command) == 0
    printed = capsys.readouterr()
    assert not CONTROL.search((printed.out + printed.err).replace("\n", "").removesuffix("\r50%"))
    assert printed.err.endswith("\r50%")


def test_a_name_of_other_bytes_than_utf8_is_printed_in_any_locale() -> None:
    code = "from megatron_mm import endings; import os; endings.run(lambda: print(os.fsdecode(b'\\xff')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"\\udcff\n" and not done.stderr


def test_a_warning_of_a_library_forges_no_line() -> None:
    code = f"from megatron_mm import endings; import warnings; endings.run(lambda: warnings.warn('x\\n{FORGED}'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stderr.count("\n") <= 2 and f"x\\n{FORGED}" in done.stderr


def strings_of_messages() -> list[tuple[str, str]]:
    """Return (place, text) of every string that is part of an error that is raised, or of a line of the log."""
    found = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_raised = isinstance(node, ast.Raise)
            is_logged = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log.")
            if is_raised or is_logged:
                inner = (part for part in ast.walk(node) if isinstance(part, ast.Constant))
                found += [(f"{path.relative_to(ROOT)}:{part.lineno}", part.value) for part in inner]
    return [(place, text) for place, text in found if isinstance(text, str)]


def test_our_own_messages_set_in_what_follows_their_first_line() -> None:
    texts = strings_of_messages()
    assert len(texts) > 300
    wrong = [place for place, text in texts if "\n" in text and re.search(r"\n(?!  )", text)]
    assert not [place for place in wrong if not place.startswith("training/watch.py")]  # its report sets itself in
