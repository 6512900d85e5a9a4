"""What a run says at its end: P.report.json, and a short table of it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from pydantic import ConfigDict

from megatron_mm.ingest import account
from megatron_mm.ingest.account import Account
from megatron_mm.ingest.document import Rejection
from megatron_mm.outside import parse_json
from megatron_mm.printable import line
from megatron_mm.settings import NonNegativeInt
from megatron_mm.shards import Counts
from megatron_mm.shards.writer import REPORT_SUFFIX
from megatron_mm.storage import replacing

LISTED = 1_000
"""Rejections that a report names; all of them are in P.rejected.jsonl."""
SHOWN = 10
"""Rejections, and names under a heading, that are printed."""
HEADINGS = (account.OTHERS, account.SET_ASIDE, account.NOT_KEPT, account.NOT_USED, account.GUESSED, account.REPLACED)
"""What the table shows of the account, in its order."""


@dataclass(frozen=True)
class Report:
    """What became of the inputs."""

    counts: Counts
    num_inputs: int
    """Pieces of work that were done."""
    rejections: Sequence[Rejection]
    """The first LISTED of counts.rejected."""
    files: dict[str, Any]
    """The files that were found, by what became of them."""
    account: Account
    """What became of what is in them, by heading and name."""
    task: int = 0
    """Which task of an array it is of: all of them find the same files."""

    def to_json(self) -> bytes:
        """Return P.report.json."""
        said = {"files": self.files, "counts": asdict(self.counts), "account": self.account, "task": self.task}
        return _as_json(said)

    def nothing(self) -> str:
        """Return what to say if no document came of the inputs."""
        why = "; ".join(_named({"set aside": self.files["set aside"], "passed over": self.files["passed over"]}))
        return f"none of the {self.files['found']} files gave a document" + (f" ({why})" if why else "")

    def table(self, prefix: str) -> str:
        """Return what is printed."""
        return "\n".join(self._lines(prefix))

    def _lines(self, prefix: str) -> Iterator[str]:
        counts = self.counts
        yield from table_of(self.files)
        yield f"{counts.documents} documents, {counts.tokens:,} tokens, {counts.rejected} rejected"
        yield "documents by source: " + _joined(counts.by_source)
        yield "media items: " + (_joined(counts.media) or "none")
        yield from _named({heading: self.account.get(heading, {}) for heading in HEADINGS})
        yield f"shards: {line(prefix)}.*"
        for rejection in self.rejections[:SHOWN]:
            yield f"  rejected {line(rejection.path)}: {line(rejection.reason)}"
        if counts.rejected > SHOWN:
            yield f"  ... and {counts.rejected - SHOWN} more in {line(prefix)}.rejected.jsonl"


def merge_reports(prefix: str, parts: Sequence[str]) -> int:
    """Write PREFIX.report.json, what the reports of several sets of shards say together; return how many there are.

    Files are those that the first task of each array found. Without any report nothing is written. Raises DataError
    for what is no report.
    """
    reports = [_read_report(Path(part + REPORT_SUFFIX)) for part in parts if Path(part + REPORT_SUFFIX).exists()]
    if reports:
        merged: dict[str, Any] = {"files": {}, "counts": {}, "account": {}, "reports": len(reports)}
        for one in reports:
            for key in ("counts", "account", *(("files",) if one["task"] == 0 else ())):
                _sum(merged[key], one[key])
        with replacing(Path(prefix + REPORT_SUFFIX)) as file:
            file.write(_as_json(merged))
    return len(reports)


class _ReportFile(TypedDict):
    """What P.report.json must say."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    files: dict[str, Any]
    counts: dict[str, Any]
    account: dict[str, dict[str, NonNegativeInt]]
    task: NotRequired[NonNegativeInt]


def _read_report(path: Path) -> dict[str, Any]:
    hint = "Preprocess the inputs again, or remove it."
    said = parse_json(path.read_bytes(), _ReportFile, where=str(path), hint=hint)
    return {"task": 0, **said}


def _sum(total: dict[str, Any], more: dict[str, Any]) -> None:
    """Add numbers by their names, however deep."""
    for name, value in more.items():
        if isinstance(value, dict):
            _sum(total.setdefault(name, {}), value)
        elif isinstance(value, int):
            total[name] = total.get(name, 0) + value


def _as_json(said: dict[str, Any]) -> bytes:
    return json.dumps(said, indent=1, sort_keys=True).encode()


def table_of(files: dict[str, Any]) -> Iterator[str]:
    """Yield what is printed of the files that were found."""
    read, number = _joined(files["read"]), sum(files["read"].values())
    yield f"{files['found']:,} files: {number:,} read ({read}), {files['read with others']:,} with them"
    yield from _named({"set aside": files["set aside"], "passed over": files["passed over"]})


def _joined(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in sorted(numbers.items()))


def _named(headings: dict[str, dict[str, int]]) -> Iterator[str]:
    for heading, names in headings.items():
        if names:
            most = dict(sorted(names.items(), key=lambda one: -one[1])[:SHOWN])
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            yield f"{heading}: {line(_joined(most))}{more}"
