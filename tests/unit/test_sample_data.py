"""The sample data is small, listed file by file, and what its tokenizer was made of."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "examples" / "sample_data"
MEDIA = ("train", "heldout")


def files() -> list[Path]:
    return [path for path in SAMPLE.rglob("*") if path.is_file()]


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in files()) < 8_000_000


def test_every_file_is_listed_with_its_licence() -> None:
    rows = re.findall(r"^\| `((?:train|heldout)/[^`]+)` \|(.*)\|$", (SAMPLE / "README.md").read_text(), re.MULTILINE)
    licences = {path: row.split("|")[2].strip() for path, row in rows}
    here = {str(path.relative_to(SAMPLE)) for path in files() if path.relative_to(SAMPLE).parts[0] in MEDIA}
    written_for_us = {name for name in here if re.search(r"/(photos|speech)/.*\.txt$", name)}
    assert licences.keys() == here - written_for_us
    assert all(licences.values())


def test_the_two_halves_share_no_file() -> None:
    contents = [{path.read_bytes() for path in (SAMPLE / half).rglob("*") if path.is_file()} for half in MEDIA]
    assert contents[0].isdisjoint(contents[1])


def test_the_tokenizer_is_made_of_the_training_half(tmp_path: Path) -> None:
    made = tmp_path / "tokenizer.json"
    tool = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), "--vocab-size", "2048", "--output", str(made)]
    subprocess.run([*tool, "--input", str(SAMPLE / "train")], check=True, capture_output=True, timeout=120)
    assert made.read_bytes() == (SAMPLE / "tokenizer.json").read_bytes()


def test_the_tokenizer_is_mentioned() -> None:
    assert "`tokenizer.json`" in (SAMPLE / "README.md").read_text()
