"""Files that a record or a page names: only plain ones, in or below the folder of the record or page."""

from pathlib import Path

from megatron_mm.errors import DataError


def file_beside(folder: Path, name: str) -> Path | None:
    """Return the file that something in `folder` names, its links followed; None if it lies outside of the folder.

    Raises DataError for what is no name of a file, and for a pipe or a device, which could be waited for without end.
    """
    try:
        target, inside = (folder / name).resolve(), folder.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # zero bytes, halves of surrogate pairs, links in a circle
        raise DataError(f"it is no name of a file ({error})") from error
    if not target.is_relative_to(inside):
        return None
    if target.exists() and not target.is_file():
        raise DataError("it is not a plain file")
    return target
