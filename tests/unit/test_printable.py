"""Nothing that comes from outside may forge a line of a log, or reach a terminal as an escape."""

import ast
import html
import json
import logging
import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from small import save_tokenizer

import megatron_mm
from megatron_mm import endings, printable
from megatron_mm.data.rendering import render_page
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.shards import EncodedDocument
from megatron_mm.source import Source
from megatron_mm.tokenizer import TextTokenizer

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
        print("\rx")
        print("\r50%", end="", file=sys.stderr)  # as a progress bar begins

    assert endings.run(command) == 0
    printed = capsys.readouterr()
    assert not CONTROL.search((printed.out + printed.err).replace("\n", "").removesuffix("\r50%"))
    assert printed.err.endswith("\r50%")


def test_a_name_of_other_bytes_than_utf8_is_printed_in_any_locale() -> None:
    code = "from megatron_mm import endings; endings.run(lambda: print('\\udcff \\u4e2d'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert done.stdout == b"\\udcff \\u4e2d\n" and not done.stderr


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


def test_preprocessing_lists_hostile_names_without_forging_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = [f"a\n{FORGED}.png".encode(), b"\xff\n  x\x1b[2J.png", "\u202e\x85\r.txt".encode(), b"$x^{$.jsonl"]
    for name in names:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"\xff\xff\xff")
    with zipfile.ZipFile(folder / "z.zip", "w") as archive:
        archive.writestr(f"m\n{FORGED}.png", "no image")
    (folder / "good.txt").write_text("good text")
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
    tool = runpy.run_path(str(ROOT.parent / "tools/preprocess_data.py"))["main"]
    command = ["preprocess", "--input", str(folder), "--tokenizer", str(tokenizer), "--output-prefix"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "p"), "--bad-input", "skip"])
    assert tool() == 0
    printed = capfd.readouterr()
    assert printed.out.count("  rejected ") == 5 and f"a\\n{FORGED}.png: " in printed.out
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "q")])
    assert tool() == 3
    failed = capfd.readouterr()
    for text in (printed.out, printed.err, failed.out, failed.err):
        assert not any(line.lstrip().startswith(FORGED) for line in re.split(r"[\r\n]", text))
        assert not CONTROL.search(re.sub(r"[\r\n]", "", text))
    records = [json.loads(line) for line in (tmp_path / "p.rejected.jsonl").read_text(encoding="ascii").splitlines()]
    assert {os.fsencode(one["path"]).removeprefix(os.fsencode(folder) + b"/") for one in records} >= set(names[:3])
    assert html.escape("\\x1b") in render_page([("\x1b\udcff", no_document())], TextTokenizer(tokenizer), decoders={})


def no_document() -> EncodedDocument:
    return EncodedDocument(np.zeros(0, np.int64), Source.TEXT)
