"""PDFs: pages per CPU-second, image boxes and reading order, beside pdfplumber, pypdf and docling-parse.

    python benchmarks/documents.py FOLDER

FOLDER holds at least 30 PDFs; beside a two-column paper `paper.pdf` its source `paper.tex` (or `paper.tex.gz`). Any
real documents do; Debian's texlive-publishers-doc, r-doc-pdf, gnuplot-doc and octave-doc have hundreds (unpack them
with `dpkg -x`). Peers: `pip install pdfplumber==0.11.10 pypdf==7.1.0 docling-parse==7.23.1`.

Every reader takes the first pages of every file: the text in its order, and the boxes of images (pypdf gives only their
number). Rounds are interleaved, each in a process of its own, and CPU time is that of the process. Reading order is the
longest run of the source's three-word phrases, among those found, that comes in the order of the source.
"""

import argparse
import bisect
import gzip
import json
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from verdict import finish

MAX_PAGES = 4
ROUNDS = 3
NAME, SPEED_BAR, ORDER_BAR = "documents", 0.1, 0.99
BOX_TOLERANCE = 3.0
"""Points within which two image boxes are one."""

Box = tuple[float, float, float, float]
Page = tuple[str, list[Box], list[Box]]
"""The text of a page, and the boxes of its images and of its drawn figures from the top left corner."""


def ours(path: Path) -> Iterator[Page]:
    """Read with megatron_mm: what ingestion does before it decodes images and renders figures."""
    import pypdfium2

    from megatron_mm.ingest.figures import Figure
    from megatron_mm.ingest.pdf import page_pieces

    with pypdfium2.PdfDocument(path) as document:
        for number in range(min(MAX_PAGES, len(document))):
            pieces = page_pieces(document[number])
            figures = [piece.box for piece in pieces if isinstance(piece.image, Figure)]
            images = [piece.box for piece in pieces if piece.image is not None and piece.box not in figures]
            yield "\n".join(piece.text for piece in pieces if piece.image is None), images, figures


def pdfplumber(path: Path) -> Iterator[Page]:
    """Read with pdfplumber as its page shows: extract_text and images."""
    import pdfplumber

    with pdfplumber.open(path) as document:
        for page in document.pages[:MAX_PAGES]:
            boxes = [(image["x0"], image["top"], image["x1"], image["bottom"]) for image in page.images]
            yield page.extract_text(), boxes, []
            page.close()


def pypdf(path: Path) -> Iterator[Page]:
    """Read with pypdf: it knows images, but not where they stand."""
    import pypdf

    for page in pypdf.PdfReader(path).pages[:MAX_PAGES]:
        yield page.extract_text(), [(0.0, 0.0, 0.0, 0.0)] * len(page.images.keys()), []


def docling(path: Path) -> Iterator[Page]:
    """Read with docling-parse: lines of text and bitmaps."""
    from docling_core.types.doc.page import TextCellUnit
    from docling_parse.pdf_parser import DoclingPdfParser

    document = DoclingPdfParser(loglevel="fatal").load(str(path))
    for number in range(1, min(MAX_PAGES, document.number_of_pages()) + 1):
        page = document.get_page(number)
        text = "\n".join(cell.text for cell in page.iterate_cells(TextCellUnit.LINE))
        boxes = [
            image.rect.to_top_left_origin(page.dimension.height).to_bounding_box() for image in page.bitmap_resources
        ]
        yield text, [(box.l, box.t, box.r, box.b) for box in boxes], []


READERS: dict[str, Callable[[Path], Iterator[Page]]] = {
    "megatron_mm": ours,
    "pdfplumber": pdfplumber,
    "pypdf": pypdf,
    "docling-parse": docling,
}


def measure(name: str, files: list[Path], *, keep: bool) -> None:
    """Read all files in this process and print a JSON line: pages, CPU seconds, failures and, to `keep`, the pages."""
    read = READERS[name]
    list(read(files[0]))  # imports
    seconds, pages, failed, kept = 0.0, 0, [], {}
    for file in files:
        start = cpu_seconds()
        try:
            read_pages = list(read(file))
        except Exception as error:
            failed.append(f"{file.name}: {type(error).__name__}")
            read_pages = []
        seconds += cpu_seconds() - start
        pages += len(read_pages)
        kept[str(file)] = read_pages
    print(json.dumps({"pages": pages, "seconds": seconds, "failed": failed, "kept": kept if keep else {}}))


def cpu_seconds() -> float:
    """Return the CPU time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def source_words(latex: str) -> list[str]:
    """Return the words of a paper's source; what is not running text is a mark that no phrase crosses."""
    text = re.sub(r"(?<!\\)%.*", "", latex)
    text = text[max(text.find(r"\begin{document}"), text.find(r"\maketitle"), 0) :]
    floats = (
        "equation align figure table tabular displaymath math thebibliography verbatim lstlisting eqnarray widetext"
    )
    for name in [*floats.split(), "CCSXML", "nomenclature", "longtable", "subequations"]:
        text = re.sub(rf"\\begin\{{{name}\*?\}}.*?\\end\{{{name}\*?\}}", " | ", text, flags=re.DOTALL)
    text = re.sub(r"\\\[.*?\\\]|\$\$.*?\$\$|\$[^$]*\$", " | ", text, flags=re.DOTALL)
    nested = r"\s*\{[^{}]*(\{[^{}]*\}[^{}]*)*\}"
    text = re.sub(rf"\\(footnote|footnotetext|thanks|marginpar){nested}", " | ", text, flags=re.DOTALL)
    commands = (
        r"cite\w*|ref|eqref|label|url|href|bibliography\w*|includegraphics|begin|end|usepackage|input|author|affiliation"
        r"|email|keywords|ccsdesc|orcid|institution|city|country|state|title|subtitle"
    )
    text = re.sub(rf"\\({commands})\*?(\[[^\]]*\])*(\{{[^{{}}]*\}})", " | ", text, flags=re.DOTALL)
    text = re.sub(r"\\[a-zA-Z@]+\*?(\[[^\]]*\])?", " ", text)
    return re.findall(r"[a-z]{2,}|\|", re.sub(r"[{}]", "", text).replace("~", " ").lower())


def page_words(text: str) -> list[str]:
    """Return the words of extracted text: ligatures opened, words divided at a line's end joined."""
    text = re.sub("[\u00ad\ufffe\x02]|[-\u2010]\\s*\n\\s*", "", text)
    for ligature, letters in {"\ufb01": "fi", "\ufb02": "fl", "\ufb00": "ff", "\ufb03": "ffi", "\ufb04": "ffl"}.items():
        text = text.replace(ligature, letters)
    return re.findall(r"[a-z]{2,}", text.lower())


def phrases(words: list[str]) -> dict[tuple[str, ...], int]:
    """Return the place of each phrase of three words that occurs once."""
    found: dict[tuple[str, ...], int] = {}
    repeated = set()
    for place in range(len(words) - 2):
        phrase = tuple(words[place : place + 3])
        if "|" not in phrase:
            repeated |= {phrase} & found.keys()
            found[phrase] = place
    return {phrase: place for phrase, place in found.items() if phrase not in repeated}


def order_score(source: str, text: str) -> float:
    """Return the fraction of the phrases in both that come in the source's order."""
    expected, read = phrases(source_words(source)), phrases(page_words(text))
    places = [read[phrase] for phrase in sorted(expected.keys() & read.keys(), key=expected.__getitem__)]
    run: list[int] = []
    for place in places:
        index = bisect.bisect_left(run, place)
        run[index : index + 1] = [place]
    return len(run) / max(1, len(places))


def found_boxes(theirs: list[Page], own: list[Page]) -> tuple[int, int]:
    """Return how many of the peer's image boxes are among ours or in a figure, and how many there are."""
    pairs = [(box, own_page) for page, own_page in zip(theirs, own, strict=True) for box in page[1]]
    near = [
        any(all(abs(a - b) <= BOX_TOLERANCE for a, b in zip(box, other)) for other in images)
        or any(is_inside(box, figure) for figure in figures)
        for box, (_, images, figures) in pairs
    ]
    return sum(near), len(near)


def is_inside(box: Box, figure: Box) -> bool:
    """Tell whether an image lies in a figure, to BOX_TOLERANCE."""
    starts = all(a >= b - BOX_TOLERANCE for a, b in zip(box[:2], figure[:2]))
    return starts and all(a <= b + BOX_TOLERANCE for a, b in zip(box[2:], figure[2:]))


def run(name: str, files: list[Path], *, keep: bool) -> dict:
    """Measure one reader in a process of its own."""
    command = [sys.executable, __file__, "--reader", name, *(["--keep"] if keep else []), *map(str, files)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{name} cannot run:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    """Measure one reader, as `run` asks, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reader:
        measure(arguments.reader, arguments.paths, keep=arguments.keep)
        return
    files = sorted(file for folder in arguments.paths for file in folder.rglob("*.pdf"))
    if len(files) < 30:
        raise SystemExit(f"there are {len(files)} PDFs; the claim is about at least 30")
    rounds: dict[str, list[dict]] = {name: [] for name in READERS}
    for number in range(ROUNDS):
        for name in READERS:
            rounds[name].append(run(name, files, keep=number == 0))
    report(files, rounds)


def report(files: list[Path], rounds: dict[str, list[dict]]) -> None:
    """Print the table and the verdict."""
    kept = {name: entries[0]["kept"] for name, entries in rounds.items()}
    speeds = {
        name: statistics.median(entry["pages"] / entry["seconds"] for entry in entries)
        for name, entries in rounds.items()
    }
    sources = {str(file): source for file in files if (source := latex_of(file)) is not None}
    print(f"{len(files)} PDFs, {len(sources)} papers with their source, at most {MAX_PAGES} pages of each")
    print(f"{'':14}{'pages':>7}{'pages/CPU-s':>13}{'min':>8}{'max':>8}{'images':>8}{'order':>8}  failed")
    orders = {}
    for name, entries in rounds.items():
        scores = [
            order_score(source, "\n".join(page[0] for page in kept[name][file])) for file, source in sources.items()
        ]
        orders[name] = statistics.mean(scores)
        each = [entry["pages"] / entry["seconds"] for entry in entries]
        images = sum(len(page[1]) for pages in kept[name].values() for page in pages)
        print(
            f"{name:14}{entries[0]['pages']:>7}{speeds[name]:>13.1f}{min(each):>8.1f}{max(each):>8.1f}{images:>8}"
            f"{orders[name]:>8.3f}  {', '.join(entries[0]['failed']) or '-'}"
        )
    both = [file for file in kept["pdfplumber"] if len(kept["pdfplumber"][file]) == len(kept["megatron_mm"][file])]
    counts = {file: found_boxes(kept["pdfplumber"][file], kept["megatron_mm"][file]) for file in both}
    found, total = (sum(count[index] for count in counts.values()) for index in (0, 1))
    print(f"image boxes of pdfplumber that megatron_mm finds, or has in the picture of a figure: {found} of {total}")
    figures = sum(len(page[2]) for pages in kept["megatron_mm"].values() for page in pages)
    print(f"drawn figures that megatron_mm finds beside them: {figures}")
    for file, (near, count) in counts.items():
        if near < count:
            print(f"  {Path(file).name}: {near} of {count}")
    holds = found == total and orders["megatron_mm"] >= ORDER_BAR and not rounds["megatron_mm"][0]["failed"]
    finish(NAME, ours=1 / speeds["megatron_mm"], peer=1 / speeds["pdfplumber"], bar=SPEED_BAR, holds=holds)


def latex_of(file: Path) -> str | None:
    """Return the source that lies beside a paper, if one does."""
    plain, packed = file.with_suffix(".tex"), file.with_suffix(".tex.gz")
    if plain.exists():
        return plain.read_text(encoding="utf-8", errors="replace")
    return gzip.decompress(packed.read_bytes()).decode("utf-8", "replace") if packed.exists() else None


if __name__ == "__main__":
    main()
