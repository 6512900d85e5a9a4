"""Papers in LaTeX, as arXiv ships their sources: a main file, its parts, figures, bibliography and styles in a folder.

A folder is one if a file in it has a class and begins a document. The paper is one document: what it includes and shows
is read in its place, styles and lists that tools write are set aside, and where nothing else lies in the folder, as in
an archive of arXiv, so is what the paper does not show.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_mm.errors import DataError
from megatron_mm.ingest import account, kinds
from megatron_mm.ingest.latex import DRAWN, SHOWN, Paper, decode, is_main
from megatron_mm.ingest.layouts.tree import Tree

MAX_BYTES = 2**24
"""Larger files are no main files: they are looked at before any worker starts."""
BEGINS = re.compile(rb"\\begin\s*\{document\}")
STYLES = frozenset({".sty", ".cls", ".bst", ".bbx", ".cbx", ".clo", ".ist", ".dtx"})
WRITTEN = frozenset({".aux", ".bbl", ".blg", ".ilg", ".lof", ".lot", ".fls", ".toc", ".bib"})
"""What tools of LaTeX read and write; a .bib is what a bibliography is made from."""
OFTEN_OTHER = frozenset({".def", ".cfg", ".fd", ".ins", ".log", ".out", ".idx", ".ind", ".spl"})
"""The same, where nothing else lies beside a paper: other tools have files of these names too."""
DATA = frozenset({".dat", ".csv", ".tikz", ".pgf", ".pstex_t", ".pdf_tex", ".txt", ".table"})
DIRECTIONS = "00README"
"""What arXiv's own file of directions begins with."""
ANCILLARY = "anc"
"""Where arXiv keeps what is no part of the paper."""
OF_PAPERS = frozenset({*kinds.LATEX.suffixes, *STYLES, *WRITTEN, *OFTEN_OTHER, *DATA, *SHOWN, *DRAWN, ""})


def arrange(tree: Tree) -> None:
    """Take each main file, and the files that belong to it."""
    papers: dict[Path, Paper] = {}
    for path in tree.all():
        if _may_be_main(path, tree):
            try:
                with account.collected():  # its reader counts again
                    if is_main(decode(path.read_bytes())):
                        papers[path] = Paper(path)
            except DataError as error:
                tree.refuse(path, str(error))
    if not papers:
        return
    parts = {path for paper in papers.values() for path in paper.files if path != paper.path}
    mains: dict[Path, list[Path]] = {}
    for path in papers.keys() - parts:
        mains.setdefault(path.parent, []).append(path)
    alone = set(mains)
    for path in tree.all():
        alone -= {folder for folder in path.parents if folder in mains and not _is_of_paper(path, folder)}
    for path, paper in papers.items():
        if path in parts:
            continue
        if paper.is_drawing:
            tree.set_aside(path, "a drawing in LaTeX")
            continue
        tree.take(path)
        for file in paper.files:
            if tree.has(file):
                tree.use(file)
    for path in tree.all():
        folder = next((folder for folder in path.parents if folder in mains), None)
        if folder is not None and (what := _what(path, folder, mains[folder], is_alone=folder in alone)):
            tree.set_aside(path, what)


def _may_be_main(path: Path, tree: Tree) -> bool:
    suffix = path.suffix.lower()
    is_named = suffix in kinds.LATEX.suffixes or (tree.of_archive and not suffix)
    return is_named and path.stat().st_size <= MAX_BYTES and BEGINS.search(path.read_bytes()) is not None


def _is_of_paper(path: Path, folder: Path) -> bool:
    """Tell whether a file may lie beside a paper of which only the sources are there."""
    is_beside = path.name.startswith(DIRECTIONS) or path.relative_to(folder).parts[0] == ANCILLARY
    return is_beside or path.suffix.lower() in OF_PAPERS


def _what(path: Path, folder: Path, mains: Sequence[Path], *, is_alone: bool) -> str:
    """Return what a file in or below the folder of some papers is that is no document, "" for any other."""
    suffix = path.suffix.lower()
    if not is_alone:
        if path.parent != folder:
            return ""
        if suffix == ".pdf" and any(path == main.with_suffix(path.suffix) for main in mains):
            return "a paper as it is printed, whose LaTeX is read"
    if suffix in STYLES:
        return f"a style of LaTeX ({suffix})"
    if suffix in WRITTEN or (is_alone and suffix in OFTEN_OTHER):
        return f"what tools of LaTeX read and write ({suffix})"
    if not is_alone:
        return ""
    if path.name.startswith(DIRECTIONS):
        return "arXiv's directions for a paper"
    if path.relative_to(folder).parts[0] == ANCILLARY:
        return "a file that lies beside a paper (anc)"
    if suffix in SHOWN or suffix in DRAWN or suffix in DATA:
        return f"a figure or data that a paper does not show ({suffix})"
    return f"LaTeX that no paper includes ({suffix})" if suffix in kinds.LATEX.suffixes else ""
