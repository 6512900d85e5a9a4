"""What kinds of file documents come from."""

import enum


class Source(enum.IntEnum):
    """What kind of file a document came from; losses are reported by it. Numbers are part of the shard format."""

    TEXT = 0
    IMAGE = 1
    AUDIO = 2
    PDF = 3
    VIDEO = 4
    OFFICE = 5
    """Office files, spreadsheets, e-books and e-mail."""
    OTHER = 6
    """Files of any other kind, such as those of a modality that a researcher adds."""
