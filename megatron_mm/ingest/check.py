"""What inputs would become, by a sample of each kind, before hours are spent on all of them."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

from megatron_mm.ingest import account
from megatron_mm.ingest.document import Document, MediaSegment, Segment, SpecialToken, TextSegment
from megatron_mm.ingest.layouts import Entry
from megatron_mm.ingest.plan import WorkPlan
from megatron_mm.ingest.report import table_of
from megatron_mm.ingest.work_items import Options, WorkItem, cut_entry, read_work
from megatron_mm.ingest.workers import Cut, Failure, Workers
from megatron_mm.printable import line

FILES = 3
"""Files of each layout and suffix that are looked at."""
DOCUMENTS = 3
"""Documents of each that are shown."""
SEGMENTS = 8
CHARACTERS = 70

Seen = tuple[list[str], account.Account]
"""What is printed of a piece of work, and what was counted in it."""


def check(plan: WorkPlan, options: Options) -> Iterator[str]:
    """Yield, line by line, what a sample of each layout and suffix becomes: its first files, the first part of each."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in plan.entries:
        groups.setdefault((entry.layout, entry.path.suffix.lower() or "(no suffix)"), []).append(entry)
    yield from table_of(plan.files())
    with Workers(1, functools.partial(_make_task, options)) as pool:
        for (layout, suffix), entries in groups.items():
            looked_at = min(FILES, len(entries))
            yield f"{layout or 'refused'}, {suffix}: {len(entries):,} files, of which {looked_at} are looked at"
            counted: account.Account = {}
            for item, result in pool.run(next(cut_entry(entry)) for entry in entries[:FILES]):
                yield f"  {line(item.path)}"
                if isinstance(result, Failure):
                    yield f"    rejected: {line(result.reason)}"
                    continue
                shown, own = result
                yield from shown
                account.add(counted, own)
            for heading, names in counted.items():
                yield f"  {heading}: " + ", ".join(f"{line(name)} {number:,}" for name, number in names.items())


def _make_task(options: Options) -> Callable[[WorkItem], Seen]:
    return functools.partial(_look_at, options=options)


def _look_at(item: WorkItem, *, options: Options) -> Seen:
    with account.collected() as counted:
        reading = read_work(item, options)
        while isinstance(reading, Cut):
            reading = read_work(reading.parts[0], options)
    documents, rejections = reading
    shown = [f"    {_describe(document)}" for document in documents[:DOCUMENTS]]
    if len(documents) > DOCUMENTS:
        shown.append(f"    ... {len(documents):,} documents of this part")
    shown += [f"    rejected {line(one.path)}: {line(one.reason)}" for one in rejections[:DOCUMENTS]]
    if len(rejections) > DOCUMENTS:
        shown.append(f"    ... {len(rejections):,} rejected")
    return shown, counted


def _describe(document: Document) -> str:
    parts = " ".join(_short(segment) for segment in islice(document.segments, SEGMENTS))
    rest = document.segments[SEGMENTS:]
    kinds = Counter(segment.modality if isinstance(segment, MediaSegment) else "text" for segment in rest)
    more = ", ".join(f"{number} more {kind}" for kind, number in kinds.items())
    return f"{document.source.name.lower()}: {parts}" + (f" ... {more}" if more else "")


def _short(segment: Segment) -> str:
    if isinstance(segment, SpecialToken):
        return segment.spelling
    if not isinstance(segment, TextSegment):
        return f"[{segment.modality} {len(segment.data):,} bytes]"
    text = segment.text.strip()
    return repr(text if len(text) <= CHARACTERS else text[:CHARACTERS] + "...")
