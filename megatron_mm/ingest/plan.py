"""The work of one run in its order, how far it has come, and what it has counted."""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_mm.ingest import account, layouts
from megatron_mm.ingest.account import Account
from megatron_mm.ingest.find import Finding
from megatron_mm.ingest.work_items import WorkItem, cut_entry


@dataclass(frozen=True)
class Share:
    """Which part of the inputs one of several runs reads: files, streams, ranges of lines that begin in its bytes."""

    task: int = 0
    tasks: int = 1

    def prefix(self, output_prefix: str) -> str:
        """Return where this run writes: one of several writes shards of its own, to be merged."""
        return output_prefix if self.tasks == 1 else f"{output_prefix}-{self.task:05d}-of-{self.tasks:05d}"


EVERYTHING = Share()


@dataclass
class _Started:
    """A piece of work under way: its file, and which piece of it, both counted."""

    file: int
    piece: int
    work: WorkItem


@dataclass
class WorkPlan:
    """The work of one run in its order, how far it has come, and its account so far."""

    finding: Finding
    share: Share
    layout: str = ""
    num_done: int = 0
    done_bytes: int = 0
    account: Account = field(default_factory=dict)
    _next: tuple[int, int] = (0, 0)  # (file, piece) that is not finished
    _started: deque[_Started] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._arranged = layouts.arrange(self.finding.files, only=self.layout)
        self.entries = self._arranged.entries
        self.sizes = [0 if one.refusal else one.path.stat().st_size + one.more_bytes for one in self.entries]
        total = sum(self.sizes)
        self._from = total * self.share.task // self.share.tasks
        self._until = total * (self.share.task + 1) // self.share.tasks
        self.num_bytes = self._until - self._from

    def files(self) -> dict[str, Any]:
        """Return what was found, by what becomes of it; all tasks of an array say the same."""
        read = Counter(one.layout for one in self.entries if not one.refusal)
        return {
            "found": len(self.finding.files),
            "read": dict(read),
            "refused": sum(bool(one.refusal) for one in self.entries),
            "read with others": self._arranged.with_others,
            "set aside": dict(Counter(one.what for one in self._arranged.aside)),
            "passed over": dict(self.finding.passed_over),
        }

    def work(self) -> Iterator[WorkItem]:
        """Yield what is not done yet, file after file: files are cut as they are reached."""
        first_file, first_piece = self._next
        before = 0
        for number, (entry, size) in enumerate(zip(self.entries, self.sizes)):
            # A file of no bytes begins where the next one does, so the last share takes what begins at its end.
            is_last = self.share.task + 1 == self.share.tasks
            if number >= first_file and before <= self._until and before + size >= self._from:
                for piece, item in enumerate(cut_entry(entry)):
                    begins = before + item.position
                    is_own = self._from <= begins and (begins < self._until or is_last)
                    if item.is_streamed and not is_own:
                        break  # it is read from its start, so it is whole the task's in whose bytes it begins
                    if is_own and (number, piece) >= (first_file, first_piece):
                        self._started.append(_Started(number, piece, item))
                        yield item
            before += size

    def take_in(self, counted: Account) -> None:
        """Add what was counted of a piece of work, or of a part of one."""
        account.add(self.account, counted)

    def finish(self, item: WorkItem) -> bool:
        """Note that `item`, a piece of work or the next part of one, is done; return whether the piece is."""
        if not item.ends:
            return False
        started = self._started.popleft()
        self._next = (started.file, started.piece + 1)
        self.num_done += 1
        self.done_bytes += started.work.num_bytes
        return True

    def progress(self) -> dict[str, Any]:
        """Return where the run is, as JSON."""
        file, piece = self._next
        done = {"done": self.num_done, "bytes": self.done_bytes, "account": self.account}
        return {"file": file, "piece": piece, **done}

    def restore(self, progress: dict[str, Any] | None) -> None:
        """Go on where an earlier run was at `progress`."""
        if progress is not None:
            self._next = (progress["file"], progress["piece"])
            self.num_done, self.done_bytes = progress["done"], progress["bytes"]
            self.account = progress["account"]
