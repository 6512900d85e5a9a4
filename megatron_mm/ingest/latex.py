"""LaTeX: the body of a paper with what it includes, its figures and its bibliography in their places."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_mm.errors import DataError
from megatron_mm.ingest import account, kinds
from megatron_mm.ingest.beside import file_beside
from megatron_mm.ingest.charset import NoText, decode_text, decode_utf8
from megatron_mm.ingest.document import Rejection, Segment, TextSegment

CLASS = re.compile(r"^[^%\n]*\\document(?:class|style)\b", re.MULTILINE)
BEGIN = re.compile(r"^[^%\n]*?\\begin\s*\{document\}", re.MULTILINE)
STANDALONE = re.compile(r"^[^%\n]*\\documentclass\s*(?:\[[^\]]{0,500}\])?\s*\{standalone\}", re.MULTILINE)
END = re.compile(r"\\end\s*\{document\}")
AS_IS = (
    r"\\begin\{(?P<environment>verbatim\*?|[BL]?Verbatim\*?|lstlisting|minted|alltt)\}(?s:.*?)\\end\{(?P=environment)\}"
    r"|\\(?:verb|lstinline)\*?(?P<bar>[^\sA-Za-z*{[])[^\n]{0,500}?(?P=bar)"
)
"""What is printed as it stands: a match has an environment, or a bar."""
NAMES = r"\{(?:verbatim|[BL]?Verbatim|lstlisting|minted|alltt|comment)"
OPENED, CLOSED = re.compile(r"\\begin" + NAMES), re.compile(r"\\end" + NAMES)
COMMENTS = re.compile(
    AS_IS + r"|\\begin\{comment\}(?s:.*?)\\end\{comment\}[ \t]*\n?"
    r"|\\(?:url|path|nolinkurl|href)\s*\{[^{}]*\}"
    r"|\\[\\%]"
    r"|\n[ \t]*%[^\n]*"
    r"|%[^\n]*(?:\n[ \t]*(?!\n)|(?=\n)|\Z)"
)
"""Comments, and what has a % that begins none. One behind text ends at the next word: TeX sees no line end there.

Here and below each form begins with one character, which is fast to find.
"""
INPUT = re.compile(
    AS_IS + r"|\\(?:input|include|subfile|includestandalone)\s*(?:\[[^\]]{0,500}\])?\s*\{\s*(?P<name>[^{}]+?)\s*\}"
    r"|\\input\s+(?P<word>[^\s{}\\%]+)"
    r"|\\(?P<sub>sub)?import\*?\s*\{\s*(?P<folder>[^{}]*?)\s*\}\s*\{\s*(?P<file>[^{}]+?)\s*\}"
)
BIBLIOGRAPHY = re.compile(
    AS_IS + r"|\\bibliography\s*\{[^{}]*\}"
    r"|\\printbibliography\b(?:\s*\[[^\]]{0,500}\])?"
)
OF_BIBLATEX = re.compile(r"\\(?:refsection|datalist|sortlist|entry)\s*\{")
"""What only biblatex can print."""
FIGURE = re.compile(
    AS_IS + r"|\\(?:includegraphics|includesvg|includepdf|epsfbox|plotone)\*?"
    r"\s*(?:\[[^\]]{0,500}\]\s*){0,2}\{(?P<name>[^{}]*)\}"
    r"|\\(?:epsfig|psfig)\*?\s*\{(?P<options>[^{}]*)\}"
    r"|\\plottwo\s*\{(?P<left>[^{}]*)\}\s*\{(?P<right>[^{}]*)\}"
)
GRAPHICS_PATH = re.compile(r"\\graphicspath\s*\{((?:\s*\{[^{}]*\})+)\s*\}")
FILE_OPTION = re.compile(r"(?:^|,)\s*(?:file|figure)\s*=\s*([^,]+)")
"""Where \\epsfig and \\psfig name their file."""
SHOWN = (".pdf", ".png", ".jpg", ".jpeg", ".gif")
DRAWN = (".eps", ".ps", ".epsi", ".svg", ".pstex")
"""Figures that are programs or drawings, and are not rendered."""
ENCODING = re.compile(rb"^[^%\n]*\\usepackage\s*\[([^\]]*)\]\s*\{inputenc\}", re.MULTILINE)
CHARSETS = {"latin1": "iso-8859-1", "latin2": "iso-8859-2", "latin5": "iso-8859-9", "latin9": "iso-8859-15"} | {
    **{"ansinew": "windows-1252", "applemac": "macintosh", "koi8-r": "koi8-r", "koi8-u": "koi8-u"},
    **{f"cp{number}": f"windows-{number}" for number in range(1250, 1258)},
}
"""What inputenc calls charsets."""
MAX_DEPTH, MAX_INCLUDED, MAX_CHARACTERS = 16, 2_000, 2**26
"""Files within files, the files that a paper includes, and the characters of all of them."""
MAX_UNCLOSED = 100
"""Environments that are printed as they stand and have no end: more are no LaTeX, and each is looked through."""
MAX_ARGUMENT = 20_000
"""Characters of a title or an author."""


def read_paper(path: Path) -> tuple[list[Segment], list[Rejection]]:
    """Return the text of LaTeX with its figures, and the figures left out; comments and preambles are counted.

    A file without \\begin{document} is read whole. Raises DataError if it holds nothing.
    """
    paper = Paper(path)
    segments, rejections = list(paper.read()), paper.rejections
    for what, number in paper.lost.items():
        account.count(account.NOT_KEPT, what, number)
    if not segments:
        raise NoText("it holds nothing but comments")
    return segments, rejections


def is_main(text: str) -> bool:
    """Tell whether a file of LaTeX is printed, and no part of another: its class may be in what it inputs."""
    begin = BEGIN.search(text)
    return begin is not None and any(one.search(text, 0, begin.start()) for one in (CLASS, INPUT))


class Paper:
    """A file of LaTeX and the files that it names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost: Counter[str] = Counter()
        """What of it is not kept, and how often."""
        self.files: set[Path] = set()
        """The files that it includes and shows."""
        self.rejections: list[Rejection] = []
        self._included, self._left = 0, MAX_CHARACTERS
        whole = self._expand(self.path, self.path.parent, 0)
        self.is_drawing = STANDALONE.search(whole) is not None
        """Whether it is made to be shown by others."""
        begin = BEGIN.search(whole)
        preamble, body = (whole[: begin.start()], whole[begin.end() :]) if begin else ("", whole)
        self._folders = [""]
        for found in GRAPHICS_PATH.finditer(whole):
            self._folders += re.findall(r"\{\s*([^{}]*?)\s*\}", found[1])
        self._front = "".join(f"{one}\n" for name in ("title", "author") for one in commands(preamble, name))
        self.lost["preambles of LaTeX, but for titles and authors"] += bool(preamble.strip())
        body = BIBLIOGRAPHY.sub(self._bibliography, END.split(body, 1)[0])
        self._body = re.sub(r"\n\s*\n(?:\s*\n)+", "\n\n", body).lstrip("\n")
        shown = [found for found in FIGURE.finditer(self._body) if not is_as_it_stands(found)]
        self._figures = [(found, [self._figure(name) for name in _names(found)]) for found in shown]

    def read(self) -> Iterator[Segment]:
        """Yield its text, and the figures that can be read."""
        text, end = (f"{self._front}\n" if self._front else ""), 0
        for found, figures in self._figures:
            text += self._body[end : found.start()]
            end = found.end()
            for image in [image for figure in figures if (image := self._image(figure)) is not None]:
                if text.strip():
                    yield TextSegment(text.lstrip("\n"))
                yield image
                text = ""
        text = text + self._body[end:]
        if text.strip():
            yield TextSegment(text.lstrip("\n").rstrip() + "\n")

    def _expand(self, path: Path, folder: Path, depth: int) -> str:
        """Return the text of a file with that of the files that it includes, which are looked for in `folder`."""
        self.files.add(path)
        text = decode(path.read_bytes())
        self._left -= len(text)
        unclosed = len(OPENED.findall(text)) - len(CLOSED.findall(text))
        if unclosed > MAX_UNCLOSED:
            raise DataError(f"it is damaged: {unclosed:,} environments of it have no end")
        text = self._without_comments(text).partition("\\endinput")[0]
        if depth:  # a part that can be printed alone has a preamble of its own
            begin = BEGIN.search(text)
            text = END.split(text[begin.end() :], 1)[0] if begin else text
        return INPUT.sub(lambda found: self._include(found, path, folder, depth), text)

    def _include(self, found: re.Match[str], path: Path, folder: Path, depth: int) -> str:
        if is_as_it_stands(found):
            return found[0]
        is_import = found["file"] is not None
        place = (path.parent if found["sub"] else folder) / found["folder"] if is_import else folder
        target = self._find(place, found["name"] or found["word"] or found["file"], ("", ".tex"))
        self._included += 1
        is_too_much = depth == MAX_DEPTH or self._included > MAX_INCLUDED or self._left < 0
        if target is None or target == path or is_too_much:
            self.lost["files that LaTeX includes and that are not there"] += 1
            return found[0]
        try:
            return self._expand(target, place, depth + 1)
        except DataError:
            self.lost["files that LaTeX includes and that are no text"] += 1
            return found[0]

    def _without_comments(self, text: str) -> str:
        text, number = without_comments(text)
        self.lost["comments of LaTeX"] += number
        return text

    def _bibliography(self, found: re.Match[str]) -> str:
        """Return what BibTeX made of a bibliography, or the command if that is not there."""
        command = found[0]
        if is_as_it_stands(found):
            return command
        own = self.path.with_suffix(".bbl")
        others = sorted(self.path.parent.glob("*.bbl"))
        source = own if own.is_file() else others[0] if len(others) == 1 else None
        if source is None:
            self.lost["bibliographies of LaTeX that are not there"] += 1
            return command
        self.files.add(source)
        try:
            text = self._without_comments(decode(source.read_bytes()))
        except DataError:
            text = ""
        if not text.strip() or OF_BIBLATEX.search(text):
            self.lost["bibliographies of LaTeX that are data of biblatex, or empty"] += 1
            return command
        return text

    def _figure(self, name: str) -> Path | None:
        """Return the file of a figure: one that can be shown, if there are several forms of it."""
        for folder in self._folders:
            place = self.path.parent / folder
            named = self._find(place, name, ("", *SHOWN, *map(str.upper, SHOWN), *DRAWN))
            if named is not None and named.suffix.lower() not in SHOWN:
                stem = named.name.removesuffix(named.suffix)
                named = self._find(named.parent, stem, SHOWN) or named
            elif named is None:
                named = self._find(place, re.sub(r"\.\w+$", "", name), SHOWN)
            if named is not None:
                self.files.add(named)
                return named
        return None

    def _image(self, figure: Path | None) -> Segment | None:
        if figure is None:
            self.lost["figures of LaTeX that are not there"] += 1
            return None
        suffix = figure.suffix.lower()
        if suffix not in SHOWN and kinds.by_suffix(figure) != kinds.IMAGE:
            self.lost[f"figures of LaTeX that are drawings ({suffix})"] += 1
            return None
        try:
            if suffix == ".pdf":
                from megatron_mm.ingest.pdf import render_first_page  # loading PDFium is spared most texts

                return render_first_page(figure)
            from megatron_mm.ingest.image import read_image

            return read_image(figure.read_bytes())
        except DataError as error:
            self.rejections.append(Rejection(f"{self.path}#{figure.name}", str(error)))
            return None

    def _find(self, folder: Path, name: str, suffixes: Sequence[str]) -> Path | None:
        """Return the first plain file of a name with one of some suffixes, in or below the folder of the paper."""
        root = self.path.parent
        for suffix in suffixes:
            try:
                place = file_beside(root, str((folder / f"{name}{suffix}").relative_to(root)))
            except (DataError, ValueError):
                continue
            if place is not None and place.is_file():
                return root / place.relative_to(root.resolve())
        return None


def is_as_it_stands(found: re.Match[str]) -> bool:
    """Tell whether a match is of what is printed as it stands, so that it is no command."""
    return found["environment"] is not None or found["bar"] is not None


def without_comments(text: str) -> tuple[str, int]:
    """Return LaTeX without its comments, and how many it had."""
    number = 0

    def drop(found: re.Match[str]) -> str:
        nonlocal number
        is_comment = found[0].startswith(("%", "\n", "\\begin{comment}"))
        number += is_comment
        return "" if is_comment else found[0]

    return COMMENTS.sub(drop, f"\n{text}").removeprefix("\n"), number


def commands(text: str, name: str) -> Iterator[str]:
    """Yield each command of a name with its arguments, whose braces may be nested."""
    for found in re.finditer(rf"\\{name}\b\s*(?:\[[^\]]{{0,500}}\]\s*)?(?=\{{)", text):
        depth, position = 0, found.end()
        for position in range(found.end(), min(found.end() + MAX_ARGUMENT, len(text))):
            character = text[position]
            if character in "{}" and text[position - 1] != "\\":
                depth += 1 if character == "{" else -1
                if not depth:
                    yield text[found.start() : position + 1]
                    break


def decode(data: bytes) -> str:
    """Return LaTeX as text: UTF-8, or in the charset of its inputenc, or in one that is guessed. Raises DataError."""
    try:
        return decode_utf8(data)
    except DataError:
        declared = ENCODING.search(data)
        return decode_text(data, CHARSETS.get(declared[1].decode("ascii", "replace").strip()) if declared else None)


def _names(found: re.Match[str]) -> list[str]:
    """Return the names of files that a command of figures shows."""
    names = [found[group] for group in ("name", "left", "right") if found[group] is not None]
    if found["options"] is not None and (option := FILE_OPTION.search(found["options"])):
        names = [option[1]]
    return [name.replace('"', "").strip() for name in names]
