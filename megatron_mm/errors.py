"""The two mistakes that a user can mend, and the end of a run that it chose; the rest is ours and is an assertion."""


class ConfigError(ValueError):
    """A setting cannot be honoured: the message names the key as the user types it, and a value that works."""


class DataError(ValueError):
    """A file is not what it should be: the message names the path, the record, and what to do."""


class RunStopped(RuntimeError):
    """To go on would do harm: the message says why. Another try, from the last checkpoint, may go better."""
