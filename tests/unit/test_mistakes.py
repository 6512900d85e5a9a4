"""More than a hundred mistakes, each with the one paragraph that answers it: tests/mistakes.yaml, which is for people.

MISTAKES_REWRITE=1 writes the answers of today into that file, and fails, so that someone reads the difference.
"""

import os
import textwrap
from pathlib import Path

import mistakes
import pytest
from launch import Ended, run_alone

MAX_LINES = 14
TRACEBACKS = ("a defect of ours",)
"""What must show where it happened: nobody but us can mend it."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """How every command of the file ends."""
    return run_alone(_make_all, str(tmp_path_factory.mktemp("mistakes")))


def _make_all(folder: str) -> dict[str, Ended]:
    mistakes.load_everything()
    place = Path(folder, "folder")
    mistakes.build(place)
    return {one.mistake: mistakes.run(one, place) for kind in mistakes.read().values() for one in kind}


def test_there_are_a_hundred_mistakes_and_more() -> None:
    found = [one for kind in mistakes.read().values() for one in kind]
    assert len({one.command + str(one.given) for one in found}) == len({one.mistake for one in found}) == len(found)
    assert len(found) >= 100


def test_every_mistake_is_answered_in_one_paragraph(answers: dict[str, Ended]) -> None:
    if os.environ.get("MISTAKES_REWRITE"):
        _rewrite(answers)
        pytest.fail(f"{mistakes.FIXTURE} is written anew: read what has changed")
    wrong = []
    for one in (one for kind in mistakes.read().values() for one in kind):
        ended = answers[one.mistake]
        answer = mistakes.answer_of(ended)
        if (ended.status, answer.split()) != (one.status, one.answer.split()):
            wrong.append(f"{one.mistake}: status {ended.status}, expected {one.status}\n{answer}")
        if one.mistake not in TRACEBACKS and (problem := _problem(ended, answer)):
            wrong.append(f"{one.mistake}: {problem}\n{ended.stderr}")
    assert not wrong, "\n\n".join(wrong)


def _problem(ended: Ended, answer: str) -> str | None:
    """Return what is wrong with the form of an answer, whatever it says."""
    lines = answer.splitlines()
    if "Traceback" in ended.stderr or "defect" in answer:
        return "it is no defect of ours"
    if ended.status not in (0, 1, 2, 3, 75, 130, 141):
        return f"{ended.status} is no status of ours"
    if ended.status not in (0, 141) and not mistakes.START.match(answer):
        return "it does not begin as an answer does"
    if not all(line.strip() for line in lines) or len(lines) > MAX_LINES:
        return f"{len(lines)} lines are no paragraph"
    return None


def _rewrite(answers: dict[str, Ended]) -> None:
    """Write the file anew, in its order, with the answers of today."""
    parts = ["# Mistakes that people make, and what this package answers. Written by tests/unit/test_mistakes.py.\n"]
    for kind, found in mistakes.read().items():
        parts.append(f"\n{kind}:\n")
        for one in found:
            ended = answers[one.mistake]
            parts.append(f"\n- mistake: {_quoted(one.mistake)}\n")
            if one.given:
                parts.append("  given: [" + ", ".join(_quoted(name) for name in one.given) + "]\n")
            parts.append(f"  command: >-\n{textwrap.indent(one.command, '    ')}\n  status: {ended.status}\n")
            parts.append(f"  answer: |\n{_wrapped(mistakes.answer_of(ended))}")
    mistakes.FIXTURE.write_text("".join(parts))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _wrapped(answer: str) -> str:
    """Return an answer as a block of YAML, its lines broken at 110 columns."""
    lines = [
        part
        for line in answer.splitlines()
        for part in textwrap.wrap(
            line, 110, initial_indent="    ", subsequent_indent="      ", break_long_words=False, break_on_hyphens=False
        )
    ]
    return "".join(part + "\n" for part in lines)
