"""Papers in LaTeX: of one paper one document, as arXiv ships their sources and as they lie in folders."""

import gzip
import io
import tarfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from corpora import Corpus, read_corpus, tar, write
from PIL import Image
from small import png

from megatron_mm.ingest import account, archive, latex, work_items
from megatron_mm.ingest.latex import Paper, commands, without_comments
from megatron_mm.ingest.work_items import DEFAULTS, WorkItem, read_work
from megatron_mm.ingest.workers import Cut

RNG = np.random.default_rng(0)
PICTURE, OTHER = png(RNG), png(RNG)
MAIN = r"""\documentclass[12pt]{article}
\usepackage{graphicx} % why not
\graphicspath{{figs/}}
\title[short]{Herons {\em and} Reeds}
\author{A. Bird}
\newcommand{\x}{1}
\begin{document}
\maketitle
% a private remark
Herons eat $x^2$ fish, 50\% of them.
\begin{figure}\includegraphics[width=\textwidth]{one}\caption{A heron.}\end{figure}
\input{sections/two}

\bibliography{refs}
\end{document}
after the end
"""
BBL = "\\begin{thebibliography}{1}\n% by BibTeX\n\\bibitem{a} A. Bird.\n\\end{thebibliography}\n"
PAPER = {
    "main.tex": MAIN,
    "sections/two.tex": "\\section{Two}\n\\include{sections/three}\nand more\n",
    "sections/three.tex": "deep text\n\\endinput\nnot this\n",
    "figs/one.png": PICTURE,
    "main.bbl": BBL,
    "neurips.sty": "\\ProvidesPackage{neurips}\n",
    "refs.bib": "@misc{a, author={A. Bird}}\n",
    "unused.eps": "%!PS-Adobe-3.0 EPSF-3.0\n",
    "unused.png": OTHER,
    "old/draft.tex": "an old section\n",
    "00README.XXX": "nohypertex\n",
    "anc/table.csv": "a,b\n1,2\n",
}
FRONT = "\\title[short]{Herons {\\em and} Reeds}\n\\author{A. Bird}\n\n\\maketitle\n"
FIRST = "Herons eat $x^2$ fish, 50\\% of them.\n\\begin{figure}"
REST = "\\caption{A heron.}\\end{figure}\n\\section{Two}\ndeep text\n\nand more\n\n"
PRINTED = "\\begin{thebibliography}{1}\n\\bibitem{a} A. Bird.\n\\end{thebibliography}\n"
SHAPE = [FRONT + FIRST, "<image>", REST + PRINTED]


def members(files: dict[str, bytes | str]) -> dict[str, bytes]:
    return {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}


def pdf(colour: str = "red") -> bytes:
    figure = plt.figure(figsize=(3, 2), facecolor=colour)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="pdf", facecolor=colour)
    plt.close(figure)
    return buffer.getvalue()


def article(body: str, preamble: str = "") -> str:
    return f"\\documentclass{{article}}\n{preamble}\\begin{{document}}\n{body}\n\\end{{document}}\n"


def read(folder: Path, files: dict[str, bytes | str]) -> Corpus:
    return read_corpus(write(folder, files))


def test_a_paper_is_one_document(tmp_path: Path) -> None:
    corpus = read(tmp_path, PAPER)
    assert corpus.shapes == [SHAPE]
    assert corpus.files["set aside"] == {
        "LaTeX that no paper includes (.tex)": 1,
        "a figure or data that a paper does not show (.eps)": 1,
        "a figure or data that a paper does not show (.png)": 1,
        "a file that lies beside a paper (anc)": 1,
        "a style of LaTeX (.sty)": 1,
        "arXiv's directions for a paper": 1,
        "what tools of LaTeX read and write (.bib)": 1,
    }
    assert corpus.files["read with others"] == 4
    assert corpus.account[account.NOT_KEPT] == {
        "comments of LaTeX": 3,
        "preambles of LaTeX, but for titles and authors": 1,
    }


@pytest.mark.parametrize("is_loose", [False, True])
def test_arxiv_ships_tars_of_papers_in_gzip(tmp_path: Path, is_loose: bool) -> None:
    files = {
        "2301/2301.00001.gz": gzip.compress(tar(members(PAPER))),
        "2301/2301.00002.gz": gzip.compress(article("A short one.").encode()),
        "2301/hep-th9901001.gz": gzip.compress(b"%comment\n" + article("An old one.").encode()),
    }
    if is_loose:
        write(tmp_path, files)
    else:
        (tmp_path / "arXiv_src_2301_001.tar").write_bytes(tar(files))
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [SHAPE, ["A short one.\n"], ["An old one.\n"]]
    assert not corpus.rejections


def test_tars_of_arxiv_are_cut_between_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    papers = {f"2301/2301.{number:05d}.gz": gzip.compress(article(f"Text {number}.").encode()) for number in range(12)}
    path = tmp_path / "arXiv_src_2301_001.tar"
    path.write_bytes(tar({"2301/2301.99999.pdf": b"%PDF-", **papers}))
    assert sum(len(marks) - 1 for marks in archive.sample_ranges(path, num_bytes=4_000)) == 13
    monkeypatch.setattr(work_items, "ARCHIVE_BYTES", 4_000)
    cut = read_work(WorkItem(path), DEFAULTS)
    assert isinstance(cut, Cut)
    found = [one for part in cut.parts for one in read_work(part, DEFAULTS)[0]]
    assert [document.segments[0].text for document in found] == [f"Text {number}.\n" for number in range(12)]


def test_figures_are_found_in_any_form_that_can_be_shown(tmp_path: Path) -> None:
    shown = ["plain", "dotted.1", "drawn.eps", "as named.jpg", "gone", "vector", "moved/page"]
    body = "\n".join(f"\\includegraphics[trim=1 2 3 4,clip]{{{name}}}" for name in shown)
    body += "\n\\epsfig{file=drawn.eps,width=3in}\\plottwo{plain}{vector}"
    jpeg = io.BytesIO()
    Image.new("RGB", (40, 30), "blue").save(jpeg, "JPEG")
    files = {
        **{"plain.PNG": PICTURE, "dotted.1.png": PICTURE, "drawn.eps": "%!PS", "drawn.png": OTHER},
        **{"as named.jpg": jpeg.getvalue(), "vector.eps": "%!PS", "moved/page.pdf": pdf()},
    }
    corpus = read(tmp_path, {"ms.tex": article(body), **files})
    assert corpus.shapes == [["<image>"] * 7]
    page = Image.open(io.BytesIO(corpus.documents[0].segments[4].data)).convert("RGB")
    assert max(page.size) == 1024
    np.testing.assert_allclose(page.getpixel((500, 300)), (255, 0, 0), atol=2)  # it is a JPEG
    assert corpus.account[account.NOT_KEPT] == {
        "preambles of LaTeX, but for titles and authors": 1,
        "figures of LaTeX that are drawings (.eps)": 2,
        "figures of LaTeX that are not there": 1,
    }


def test_what_is_printed_as_it_stands_shows_and_includes_nothing(tmp_path: Path) -> None:
    body = "\\begin{verbatim}\n\\includegraphics{x} \\input{y} \\bibliography{z}\n\\end{verbatim}\n\\verb|\\input{y}|"
    corpus = read(tmp_path, {"ms.tex": article(body), "x.png": PICTURE, "y.tex": "why", "ms.bbl": BBL})
    assert corpus.shapes == [[body + "\n"]]
    assert corpus.files["read with others"] == 0


def test_postscript_is_no_text_wherever_it_lies(tmp_path: Path) -> None:
    files = {
        "a.eps": "%!PS-Adobe-3.0 EPSF-3.0\n1 setgray\n",
        "b.ps": b"\xc5\xd0\xd3\xc6" + bytes(30),
        "c.ps": "PS: bye\n",
    }
    corpus = read(tmp_path, files)
    assert corpus.shapes == [["PS: bye\n"]]
    assert sum(corpus.files["set aside"].values()) == 2


def test_a_damaged_figure_is_listed_and_the_paper_kept(tmp_path: Path) -> None:
    corpus = read(tmp_path, {"ms.tex": article("a \\includegraphics{x} b"), "x.png": PICTURE[:50]})
    assert corpus.shapes == [["a  b\n"]]
    assert corpus.rejections[0].path == f"{tmp_path}/ms.tex#x.png"
    assert corpus.rejections[0].is_part


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a % b\n", "a \n"),
        ("a% b\n  c\n", "ac\n"),
        ("a% b\n\nc\n", "a\n\nc\n"),
        ("a\n  % b\n  c\n", "a\n  c\n"),
        ("50\\% of\\\\% b\n c", "50\\% of\\\\c"),
        ("\\verb|%| and \\verb+a%b+ % c\n", "\\verb|%| and \\verb+a%b+ \n"),
        ("\\url{http://x/%20y}% c\n", "\\url{http://x/%20y}\n"),
        ("\\begin{verbatim}\n% kept\n\\end{verbatim}\n% not\n", "\\begin{verbatim}\n% kept\n\\end{verbatim}\n"),
        ("a\n\\begin{comment}\nb\n\\end{comment}\nc", "a\nc"),
    ],
)
def test_comments_end_as_tex_has_it(text: str, left: str) -> None:
    found, number = without_comments(text)
    assert found.rstrip("\n") == left.rstrip("\n")
    assert number == 1


def test_what_is_no_comment_is_kept() -> None:
    text = "50\\% of \\\\ \\verb|%| \\begin{minted}{c}\n% {\n\\end{minted} \\href{http://x/%7e}{y} \\verb no\n"
    assert without_comments(text) == (text, 0)


def test_commands_end_with_their_braces() -> None:
    text = r"\title[a]{b {c} \} d} \author{e} \titlefont{f} \author{g \thanks{h}} \author{open"
    assert list(commands(text, "title")) == [r"\title[a]{b {c} \} d}"]
    assert list(commands(text, "author")) == [r"\author{e}", r"\author{g \thanks{h}}"]


def test_what_is_included_and_not_there_is_counted_and_named_in_the_text(tmp_path: Path) -> None:
    body = "\\input{gone} \\input ../outside \\input{ms} \\bibliography{refs} \\subfile{part}"
    files = {"p/ms.tex": article(body), "outside.tex": "secret", "p/part.tex": article("the part")}
    corpus = read(tmp_path, files)
    secret, paper = corpus.shapes
    assert secret == ["secret\n"]
    assert paper == ["\\input{gone} \\input ../outside \\input{ms} \\bibliography{refs} \nthe part\n"]
    assert corpus.account[account.NOT_KEPT]["files that LaTeX includes and that are not there"] == 3
    assert corpus.account[account.NOT_KEPT]["bibliographies of LaTeX that are not there"] == 1


def test_files_that_include_each_other_end(tmp_path: Path) -> None:
    write(tmp_path, {"a.tex": article("\\input{b}"), "b.tex": "x \\input{c}", "c.tex": "y \\input{b}"})
    paper = Paper(tmp_path / "a.tex")
    assert paper.lost["files that LaTeX includes and that are not there"] == 1
    assert {path.name for path in paper.files} == {"a.tex", "b.tex", "c.tex"}


def test_files_that_include_ever_more_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latex, "MAX_INCLUDED", 50)
    files = {f"{number}.tex": f"x\\input{{{number + 1}}}" * 10 for number in range(10)}
    write(tmp_path, {**files, "ms.tex": article("\\input{0}")})
    paper = Paper(tmp_path / "ms.tex")
    assert 10 < paper.lost["files that LaTeX includes and that are not there"] < 600


def test_environments_without_an_end_are_no_latex(tmp_path: Path) -> None:
    corpus = read(tmp_path, {"ms.tex": article("\\begin{verbatim}" * 200), "b.tex": article("words")})
    assert corpus.shapes == [["words\n"]]
    assert "200 environments of it have no end" in corpus.reasons[0]


def test_data_of_biblatex_are_counted_and_not_read(tmp_path: Path) -> None:
    files = {"ms.tex": article("words \\printbibliography[title=X]"), "ms.bbl": "\\refsection{0}\\datalist[entry]{x}"}
    corpus = read(tmp_path, files)
    assert corpus.shapes == [["words \\printbibliography[title=X]\n"]]
    assert corpus.account[account.NOT_KEPT]["bibliographies of LaTeX that are data of biblatex, or empty"] == 1


def test_papers_in_the_charset_of_inputenc_are_read(tmp_path: Path) -> None:
    text = article("Le héron et l'œuf", "\\usepackage[cp1252]{inputenc}\n")
    assert read(tmp_path, {"ms.tex": text.encode("cp1252")}).shapes == [["Le héron et l'œuf\n"]]


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_charset_is_guessed_once_for_each_file(tmp_path: Path, is_packed: bool) -> None:
    text = article("Le héron mangeait des poissons près de la rivière, où l'été était très long.").encode("latin-1")
    write(tmp_path, {"x.tar": tar({"ms.tex": text})} if is_packed else {"ms.tex": text})
    corpus = read_corpus(tmp_path)
    assert "héron" in corpus.shapes[0][0]
    assert sum(corpus.account[account.GUESSED].values()) == 1


def test_beside_a_paper_other_files_stay_documents(tmp_path: Path) -> None:
    files = {"doc/manual.tex": article("the manual"), "doc/logo.png": PICTURE, "doc/main.py": "import os\n"}
    files |= {"doc/notes.tex": "loose notes % remark\n", "doc/manual.pdf": pdf(), "doc/build.log": "built\n"}
    corpus = read(tmp_path, {**files, "doc/x.sty": "\\relax", "doc/other/X.cls": "class X {}\n"})
    expected = [["<image>"], ["built\n"], ["class X {}\n"], ["import os\n"], ["loose notes\n"], ["the manual\n"]]
    assert sorted(corpus.shapes) == expected
    assert corpus.files["set aside"] == {
        "a paper as it is printed, whose LaTeX is read": 1,
        "a style of LaTeX (.sty)": 1,
    }


def test_the_class_of_a_paper_may_be_in_what_it_inputs(tmp_path: Path) -> None:
    files = {
        "ms.tex": "\\input{pre}\n\\begin{document}\nwords\n\\end{document}",
        "pre.tex": "\\documentclass{article}\n",
    }
    corpus = read(tmp_path, files)
    assert corpus.shapes == [["words\n"]]
    assert corpus.files["read with others"] == 1


def test_drawings_that_stand_alone_are_no_papers(tmp_path: Path) -> None:
    drawing = "\\documentclass[tikz]{standalone}\n\\begin{document}\\draw (0,0);\\end{document}\n"
    corpus = read(tmp_path, {"ms.tex": article("words"), "fig.tex": drawing})
    assert corpus.shapes == [["words\n"]]
    assert corpus.files["set aside"] == {"a drawing in LaTeX": 1}


def test_latex_without_a_document_is_read_whole(tmp_path: Path) -> None:
    plain = "\\input amstex\n\\magnification=1200\nPlain text. % c\n\\bye\n"
    corpus = read(tmp_path, {"old.tex": plain, "empty.tex": "% only\n"})
    assert corpus.shapes == [["\\input amstex\n\\magnification=1200\nPlain text. \\bye\n"]]
    assert corpus.account[account.OTHERS] == {"files of LaTeX that hold nothing but comments": 1}


def test_links_in_papers_lead_nowhere(tmp_path: Path) -> None:
    """A member of a paper that is a link is left out, and no name leads out of its folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as output:
        link = tarfile.TarInfo("secret.tex")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        output.addfile(link)
        data = article("\\input{secret}\\input{/etc/passwd}\\includegraphics{../../x}words").encode()
        entry = tarfile.TarInfo("ms.tex")
        entry.size = len(data)
        output.addfile(entry, io.BytesIO(data))
    (tmp_path / "2301.00001.tar").write_bytes(buffer.getvalue())
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [["\\input{secret}\\input{/etc/passwd}words\n"]]
    assert corpus.reasons == ["it is a link or a device"]
