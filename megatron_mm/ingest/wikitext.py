"""Wikitext, as MediaWiki writes it, to plain text; what a page says by templates, notes and files is counted."""

import re
from collections.abc import Callable, Iterator
from typing import Final

import mwparserfromhell
from mwparserfromhell import nodes
from mwparserfromhell.wikicode import Wikicode

from megatron_mm.ingest import account

FILES: Final = frozenset({"file", "image", "media"})
CATEGORIES: Final = frozenset({"category"})
"""Names of namespaces that every wiki knows, whatever its language."""
DROPPED = {
    "ref": "references",
    "references": "references",
    "gallery": "files",
    "imagemap": "files",
    **dict.fromkeys(("timeline", "graph", "score", "hiero", "templatestyles", "mapframe", "maplink"), "drawn parts"),
}
"""Tags whose content is no text, and what the account calls what is lost with them."""
BLOCKS = {"p", "div", "blockquote", "center", "pre", "syntaxhighlight", "source", "poem", "dl", "ul", "ol"}
MARKS = {"*": "* ", "#": "# ", ":": "", ";": ""}
"""What stands for the mark of an item of a list."""
SPACE = re.compile(r"[ \xa0]+")
BLANK_LINES = re.compile(r"\n{3,}")


def plain_text(wikitext: str, *, files: frozenset[str] = FILES, categories: frozenset[str] = CATEGORIES) -> str:
    """Return what a reader of the page sees as text: paragraphs, headings, items of lists, rows of tables by tabs.

    `files` and `categories` are the names, in lower case, of the namespaces whose links show a file or say where the
    page belongs. Those links, templates and notes are left out, and counted as not kept.
    """
    writer = _Writer(files, categories)
    text = "".join(writer.write(mwparserfromhell.parse(wikitext, skip_style_tags=False)))
    lines = (SPACE.sub(" ", line).strip(" ") for line in text.split("\n"))
    return BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()


class _Writer:
    """Writes the parts of a page, one after the other."""

    def __init__(self, files: frozenset[str], categories: frozenset[str]) -> None:
        self.files, self.categories = files, categories

    def write(self, code: Wikicode | None) -> Iterator[str]:
        for node in () if code is None else code.nodes:
            yield from WRITERS[type(node)](self, node)

    def text(self, node: nodes.Text) -> Iterator[str]:
        yield node.value

    def entity(self, node: nodes.HTMLEntity) -> Iterator[str]:
        try:
            yield node.normalize()
        except (ValueError, OverflowError):  # a number that is no character
            account.count(account.NOT_KEPT, "characters that there are not")

    def comment(self, node: nodes.Comment) -> Iterator[str]:
        yield from ()

    def template(self, node: nodes.Template) -> Iterator[str]:
        account.count(account.NOT_KEPT, "templates")
        yield from ()

    def argument(self, node: nodes.Argument) -> Iterator[str]:
        yield from self.write(node.default)

    def heading(self, node: nodes.Heading) -> Iterator[str]:
        yield "\n"
        yield "".join(self.write(node.title)).strip()
        yield "\n"

    def link(self, node: nodes.Wikilink) -> Iterator[str]:
        namespace, colon, _ = str(node.title).partition(":")
        name = namespace.strip().lower().replace("_", " ")
        if colon and name in self.files:
            account.count(account.NOT_KEPT, "files")
        elif colon and name in self.categories:
            account.count(account.NOT_KEPT, "categories")
        elif node.text is None:
            yield from self.write(node.title)
        else:
            yield from self.write(node.text)

    def address(self, node: nodes.ExternalLink) -> Iterator[str]:
        if node.title is not None:
            yield from self.write(node.title)
        elif not node.brackets:
            yield str(node.url)
        else:
            account.count(account.NOT_KEPT, "addresses")

    def tag(self, node: nodes.Tag) -> Iterator[str]:
        name = str(node.tag).strip().lower()
        if name in DROPPED:
            account.count(account.NOT_KEPT, DROPPED[name])
        elif name in ("li", "dt", "dd") and node.wiki_markup:
            yield MARKS.get(str(node.wiki_markup), "")
        elif name in ("br", "hr"):
            yield "\n"
        elif name == "table":
            yield "\n"
            yield from self._rows(node.contents)
            yield "\n"
        elif name in BLOCKS:
            yield "\n"
            yield from self.write(node.contents)
            yield "\n"
        else:
            yield from self.write(node.contents)

    def _rows(self, code: Wikicode | None) -> Iterator[str]:
        """Write the rows of a table, a line each; cells that stand in no row of their own are the first."""
        cells: list[str] = []
        for node in () if code is None else code.nodes:
            name = str(node.tag).strip().lower() if isinstance(node, nodes.Tag) else ""
            if name == "td" and str(node).startswith("|+"):
                yield "".join(self.write(node.contents)).strip().removeprefix("+").strip() + "\n"
            elif name in ("td", "th"):
                cells.append(" ".join("".join(self.write(node.contents)).split()))
            elif name in ("tr", "tbody", "thead"):
                yield _row(cells)
                cells = []
                yield from self._rows(node.contents)
            elif name == "caption" or (isinstance(node, nodes.Text) and node.value.strip()):
                yield "".join(WRITERS[type(node)](self, node)).strip() + "\n"
            else:
                yield from (part for part in WRITERS[type(node)](self, node) if part.strip())
        yield _row(cells)


def _row(cells: list[str]) -> str:
    return "\t".join(cells) + "\n" if any(cells) else ""


WRITERS: dict[type[nodes.Node], Callable[[_Writer, nodes.Node], Iterator[str]]] = {
    nodes.Text: _Writer.text,
    nodes.HTMLEntity: _Writer.entity,
    nodes.Comment: _Writer.comment,
    nodes.Template: _Writer.template,
    nodes.Argument: _Writer.argument,
    nodes.Heading: _Writer.heading,
    nodes.Wikilink: _Writer.link,
    nodes.ExternalLink: _Writer.address,
    nodes.Tag: _Writer.tag,
}
"""Who writes each kind of part."""
