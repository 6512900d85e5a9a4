"""LaTeX: the body of a paper with what it includes, its figures and its bibliography in their places."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_mm.errors import DataError
from megatron_mm.ingest import account, kinds
from megatron_mm.ingest.beside import file_beside
from megatron_mm.ingest.charset import decode_text, decode_utf8
from megatron_mm.ingest.document import Rejection, Segment, TextSegment
from megatron_mm.ingest.image import read_image

CLASS = re.compile(r"^[^%\n]*\\document(?:class|style)\b", re.MULTILINE)
BEGIN = re.compile(r"^[^%\n]*?\\begin\s*\{document\}", re.MULTILINE)
STANDALONE = re.compile(r"^[^%\n]*\\documentclass\s*(?:\[[^\]]*\])?\s*\{standalone\}", re.MULTILINE)
END = re.compile(r"\\end\s*\{document\}")
COMMENTS = re.compile(
    r"\\begin\{(?P<asis>verbatim\*?|[BL]?Verbatim\*?|lstlisting|minted|alltt)\}.*?\\end\{(?P=asis)\}"
    r"|(?P<block>\\begin\{comment\}.*?\\end\{comment\}[ \t]*\n?)"
    r"|\\(?:verb|lstinline)\*?(?P<bar>[^\sA-Za-z*{[])[^\n]*?(?P=bar)"
    r"|\\(?:url|path|nolinkurl|href)\s*\{[^{}]*\}"
    r"|\\."
    r"|(?P<line>(?:(?<=\n)|\A)[ \t]*%[^\n]*(?:\n|\Z))"
    r"|(?P<rest>%[^\n]*(?:\n[ \t]*(?!\n)|(?=\n)|\Z))",
    re.DOTALL,
)
"""Comments, and what has a % that begins none. One behind text ends at the next word: TeX sees no line end there."""
INPUT = re.compile(
    r"\\(?:input|include|subfile|includestandalone)\s*(?:\[[^\]]*\])?\s*\{\s*([^{}]+?)\s*\}"
    r"|\\input\s+([^\s{}\\%]+)"
    r"|\\(?:sub)?import\*?\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]+?)\s*\}"
)
BIBLIOGRAPHY = re.compile(r"\\bibliography\s*\{[^{}]*\}|\\printbibliography\b(?:\s*\[[^\]]*\])?")
OF_BIBLATEX = re.compile(r"\\(?:refsection|datalist|sortlist|entry)\s*\{")
"""What only biblatex can print."""
FIGURE = re.compile(
    r"\\(?:includegraphics|includesvg|includepdf|epsfig|psfig|epsfbox|plotone)\*?\s*(?:\[[^\]]*\]\s*){0,2}\{([^{}]*)\}"
    r"|\\plottwo\s*\{([^{}]*)\}\s*\{([^{}]*)\}"
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
MAX_DEPTH = 16
"""Files within files."""


def read_paper(path: Path) -> tuple[list[Segment], list[Rejection]]:
    """Return the text of LaTeX with its figures, and the figures left out; comments and preambles are counted.

    A file without \\begin{document} is read whole. Raises DataError if it holds nothing.
    """
    paper = Paper(path)
    segments, rejections = list(paper.read()), paper.rejections
    for what, number in paper.lost.items():
        account.count(account.NOT_KEPT, what, number)
    if not segments:
        raise DataError("it holds nothing but comments")
    return segments, rejections


def is_main(text: str) -> bool:
    """Tell whether a file of LaTeX is one that is printed, and not a part of one."""
    return CLASS.search(text) is not None and BEGIN.search(text) is not None


class Paper:
    """A file of LaTeX and the files that it names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost: Counter[str] = Counter()
        """What of it is not kept, and how often."""
        self.files: set[Path] = set()
        """The files that it includes and shows."""
        self.rejections: list[Rejection] = []
        whole = self._expand(self.path, self.path.parent, 0)
        begin = BEGIN.search(whole)
        preamble, body = (whole[: begin.start()], whole[begin.end() :]) if begin else ("", whole)
        self._folders = [""]
        for found in GRAPHICS_PATH.finditer(whole):
            self._folders += re.findall(r"\{\s*([^{}]*?)\s*\}", found[1])
        self._front = "".join(f"{one}\n" for name in ("title", "author") for one in commands(preamble, name))
        self.lost["preambles of LaTeX, but for titles and authors"] += bool(preamble.strip())
        body = BIBLIOGRAPHY.sub(lambda found: self._bibliography(found[0]), END.split(body, 1)[0])
        self._body = re.sub(r"\n\s*\n(?:\s*\n)+", "\n\n", body).lstrip("\n")
        self._figures = [
            (found, [self._figure(name) for name in _names(found)]) for found in FIGURE.finditer(self._body)
        ]

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
        text = self._without_comments(text).partition("\\endinput")[0]
        if depth:  # a part that can be printed alone has a preamble of its own
            begin = BEGIN.search(text)
            text = END.split(text[begin.end() :], 1)[0] if begin else text
        return INPUT.sub(lambda found: self._include(found, path, folder, depth), text)

    def _include(self, found: re.Match[str], path: Path, folder: Path, depth: int) -> str:
        place, name = folder, found[1] or found[2]
        if name is None:
            is_sub = found[0].startswith("\\sub")
            place, name = (path.parent if is_sub else folder) / found[3], found[4]
        target = self._find(place, name, ("", ".tex"))
        if target is None or depth == MAX_DEPTH or target == path:
            self.lost["files that LaTeX includes and that are not there"] += 1
            return found[0]
        try:
            return self._expand(target, place if found[3] is not None else folder, depth + 1)
        except DataError:
            self.lost["files that LaTeX includes and that are no text"] += 1
            return found[0]

    def _without_comments(self, text: str) -> str:
        def drop(found: re.Match[str]) -> str:
            if found["line"] is None and found["rest"] is None and found["block"] is None:
                return found[0]
            self.lost["comments of LaTeX"] += 1
            return ""

        return COMMENTS.sub(drop, text)

    def _bibliography(self, command: str) -> str:
        """Return what BibTeX made of a bibliography, or the command if that is not there."""
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


def commands(text: str, name: str) -> Iterator[str]:
    """Yield each command of a name with its arguments, whose braces may be nested."""
    for found in re.finditer(rf"\\{name}\b\s*(?:\[[^\]]*\]\s*)?(?=\{{)", text):
        depth, position = 0, found.end()
        for position in range(found.end(), len(text)):
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
    names = [name for name in found.groups() if name is not None]
    if "fig{" in found[0].replace(" ", "") and (option := FILE_OPTION.search(names[0])):
        names = [option[1]]
    return [name.strip().strip('"').replace('"', "") for name in names]
