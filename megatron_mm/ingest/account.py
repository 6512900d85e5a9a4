"""The account of a run: what became of everything that it took in, counted by heading and name.

Readers call `count` where they take in, lose, guess or pass over something; what they count while a piece of work is
read is collected with its documents, and the accounts of all pieces are added up in P.report.json. Every account must
balance: inputs = documents + rejections + what is no document. An input here is what a reader is given one of: a file,
a member of an archive, a line, a row, a record.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

INPUTS: Final = "inputs"
"""Heading: what was read, by kind. A container counts as what is in it, or as itself if it cannot be opened."""
OTHERS: Final = "no documents"
"""Heading: inputs that are neither documents nor rejected, by what they are: records of requests, redirects, ..."""
USED: Final = "fields used"
NOT_USED: Final = "fields not used"
NOT_KEPT: Final = "not kept"
"""Heading: what of a document could not be kept, by what it is: images that are addresses, hidden text, ..."""
GUESSED: Final = "guessed"
"""Heading: what no file said and was guessed: the charset of a page."""
SET_ASIDE: Final = "set aside"
"""Heading: files that are no documents of their own, by what they are: statistics, tables beside tars, ..."""
REPLACED: Final = "characters replaced"
MAX_NAMES = 200
"""Names under one heading that are counted apart: a corpus has few fields, a mistake may make many."""
OTHER_NAMES: Final = "(other names)"

Account = dict[str, dict[str, int]]
"""Numbers by heading and name."""

_open: ContextVar[Account | None] = ContextVar("account", default=None)


def count(heading: str, name: str, number: int = 1) -> None:
    """Add `number` to what is counted of `name` under `heading` for the piece of work that is being read.

    Outside of `collected`, as when one file is looked at, nothing is counted.
    """
    account = _open.get()
    if account is not None and number:
        add(account, {heading: {name: number}})


@contextmanager
def collected() -> Iterator[Account]:
    """Collect what is counted inside."""
    account: Account = {}
    token = _open.set(account)
    try:
        yield account
    finally:
        _open.reset(token)


@contextmanager
def kept_if_whole() -> Iterator[None]:
    """Count what is counted inside only if nothing is raised: what was read of a damaged file is thrown away."""
    with collected() as own:
        yield
    _add_to_open(own)


@contextmanager
def of_one_input() -> Iterator[None]:
    """Count what is counted inside, but no inputs: all of them are parts of one."""
    with collected() as own:
        yield
    _add_to_open({heading: names for heading, names in own.items() if heading not in (INPUTS, OTHERS)})


def _add_to_open(own: Account) -> None:
    account = _open.get()
    if account is not None:
        add(account, own)


def add(account: Account, other: Account) -> None:
    """Add the numbers of `other` to `account`."""
    for heading, names in other.items():
        own = account.setdefault(heading, {})
        for name, number in names.items():
            known = name in own or len(own) < MAX_NAMES
            name = name if known else OTHER_NAMES
            own[name] = own.get(name, 0) + number


def total(account: Account, heading: str) -> int:
    """Return the sum of what was counted under a heading."""
    return sum(account.get(heading, {}).values())


def imbalance(account: Account, *, documents: int, rejected: int) -> str:
    """Return how an account fails to add up, "" if inputs are documents, whole rejections and what is no document."""
    inputs, others = total(account, INPUTS), total(account, OTHERS)
    if inputs == documents + rejected + others:
        return ""
    return f"{inputs} inputs are not {documents} documents, {rejected} rejected and {others} that are no documents"
