"""Media and the file of the same name beside each that holds its text."""

from collections.abc import Iterable
from pathlib import Path

from megatron_mm.ingest import kinds


def is_captioned(path: Path) -> bool:
    """Return whether the text of a file, by its name, may stand in another one of the same name beside it."""
    kind = kinds.by_suffix(path)
    return kind is not None and kind.captioned


def pair_captions(files: Iterable[Path]) -> dict[Path, Path]:
    """Pair each image, recording and video with the file of the same name beside it that holds its text.

    That is a text file or else a JSON object with a text field (WebDataset's conventions).
    """
    files = list(files)
    texts = {
        file.with_suffix(""): file for suffix in (".json", ".txt") for file in files if file.suffix.lower() == suffix
    }
    media = (file for file in files if is_captioned(file))
    return {file: texts[file.with_suffix("")] for file in media if file.with_suffix("") in texts}
