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


def refuse_found(path: Path, folder: Path, *, follow_links: bool) -> str:
    """Return why what was found below an input folder is not opened; "" of a file that is, and of what holds nothing.

    A link within the folder is one more name of a file, and of a folder it adds nothing.
    """
    if path.is_symlink():
        if not path.exists():
            return "it is a link to nothing"
        target = path.resolve()
        is_outside = not target.is_relative_to(folder.resolve())
        if is_outside and path.is_dir():
            return f"it is a link to the folder {target}, outside of {folder}: give that to --input too"
        if is_outside and not follow_links:
            return (
                f"it is a link to {target}, outside of {folder}: read it with --follow-links, or give that to --input"
            )
    return "" if path.is_file() or path.is_dir() else "it is a pipe, a socket or a device, not a file"
