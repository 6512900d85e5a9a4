"""Builds what benchmarks/warc.py reads: a WARC.gz of pages as news sites and wikis send them, around real texts.

    python benchmarks/make_corpus.py build/corpus
    python benchmarks/make_warc.py build/corpus

A page has 20 to 150 kB: a head with styles, scripts and data for search engines; bars of navigation; an article of
paragraphs with links, lists, a table and images that are addresses; comments; columns of links; a footer. Its texts are
those of corpus.jsonl. Each page lies as Common Crawl has it: a request, a response and a record of metadata, each in a
gzip member of its own. One page in twenty declares another charset than UTF-8.
"""

import argparse
import gzip
import html
import json
import random
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

DATE = "2026-11-27T18:10:43Z"
PAGES = 1500
FEW_PAGES = 300
"""Pages of a second file, the first of the same, by which what starting costs is told from what pages cost."""
ARTICLE_CHARACTERS = (800, 14_000)
SECTIONS = ("Home", "World", "Science", "Culture", "Travel", "Opinion", "Archive", "Weather", "Sport", "Shop", "About")


def main() -> None:
    """Write pages.warc.gz, few.warc.gz, and pages.json, which holds the paragraphs of each page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that make_corpus.py made")
    parser.add_argument("--pages", type=int, default=PAGES, help=f"how many pages (default {PAGES})")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    rng = random.Random(1234)
    sizes = []
    paragraphs: dict[str, list[str]] = {}
    with open(folder / "pages.warc.gz", "wb") as file:
        file.write(
            gzip.compress(record("warcinfo", {"Content-Type": "application/warc-fields"}, b"software: test\r\n"))
        )
        for number, text in enumerate(texts(folder / "corpus.jsonl", arguments.pages)):
            url = f"https://www.example.org/section-{number % 11}/article-{number}.html"
            page, paragraphs[url] = make_page(rng, text, url)
            charset = "utf-8" if number % 20 else "iso-8859-1"
            data = page.encode(charset, "xmlcharrefreplace")
            sizes.append(len(data))
            for one in records(url, data, charset):
                file.write(gzip.compress(one, 6))
            if number + 1 == FEW_PAGES:
                file.flush()
                shutil.copyfile(folder / "pages.warc.gz", folder / "few.warc.gz")
    (folder / "pages.json").write_text(json.dumps(paragraphs))
    total = (folder / "pages.warc.gz").stat().st_size
    print(f"{len(sizes)} pages of {min(sizes):,} to {max(sizes):,} bytes, {sum(sizes):,} in all, {total:,} compressed")


def texts(path: Path, count: int) -> Iterator[str]:
    """Yield the first texts of a corpus that can be articles."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"]
            if len(text) >= ARTICLE_CHARACTERS[0] and count:
                count -= 1
                yield text


def records(url: str, page: bytes, charset: str) -> Iterator[bytes]:
    """Yield the three records of a page."""
    http = "application/http; msgtype="
    yield record("request", {"WARC-Target-URI": url, "Content-Type": f"{http}request"}, b"GET / HTTP/1.1\r\n\r\n")
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset={charset}\r\nX-Crawl-Content-Encoding: gzip\r\n\r\n"
    fields = {"WARC-Target-URI": url, "Content-Type": f"{http}response", "WARC-Identified-Payload-Type": "text/html"}
    yield record("response", fields, head.encode() + page)
    yield record("metadata", {"WARC-Target-URI": url, "Content-Type": "application/warc-fields"}, b"fetchTimeMs: 9\r\n")


def record(kind: str, fields: dict[str, str], block: bytes) -> bytes:
    """Return one record of a WARC file."""
    lines = ["WARC/1.0", f"WARC-Type: {kind}", f"WARC-Date: {DATE}", f"WARC-Record-ID: <urn:uuid:{zlib.crc32(block)}>"]
    lines += [*(f"{name}: {value}" for name, value in fields.items()), f"Content-Length: {len(block)}", "", ""]
    return "\r\n".join(lines).encode() + block + b"\r\n\r\n"


def make_page(rng: random.Random, text: str, url: str) -> tuple[str, list[str]]:
    """Return a page around a text, and the paragraphs of its article."""
    words = [word for word in text.split() if word.isalpha()][:400] or ["word"]
    text = text[: rng.randint(*ARTICLE_CHARACTERS)]
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    title = html.escape(" ".join(paragraphs[0].split()[:9]))
    bulk = rng.choice((1, 1, 2, 3, 5))
    parts = [
        f"{head(rng, title, url, bulk)}<body class='page page--{name(rng)}'>\n<!-- {name(rng)} begins -->\n",
        '<header class="site-header"><a href="/"><img src="/logo.svg" alt="Logo"></a>\n',
        f'{menu(rng, words, 12 * bulk)}</header>\n<main id="main"><div class="grid"><article class="story">',
        f'<h1>{title}</h1>\n<div class="byline">By <a href="/{name(rng)}">A. Writer</a> <time>27 November</time></div>',
        *(paragraph(rng, part) for part in paragraphs),
        table(rng, words),
        f'<ul class="tags">{"".join(f"<li>{link(rng, words)}</li>" for _ in range(8))}</ul></article>\n',
        f'<aside class="side">{"".join(card(rng, words) for _ in range(12 * bulk))}</aside></div>\n',
        f'<section class="comments"><h2>Comments</h2>{"".join(comment(rng, words) for _ in range(5 * bulk))}</section>',
        f'</main>\n<footer class="site-footer">{menu(rng, words, 18)}<p class="legal">&copy; Example</p></footer>\n',
        f"<script>\n{script(rng, 90 * bulk)}</script>\n",
        *(f'<script async src="https://cdn.example.net/{name(rng)}.js"></script>\n' for _ in range(6)),
        "</body>\n</html>\n",
    ]
    return "".join(parts), paragraphs


def head(rng: random.Random, title: str, url: str, bulk: int) -> str:
    """Return what stands before the body of a page."""
    data = json.dumps({"@type": "NewsArticle", "headline": title, "url": url})
    parts = [
        f'<!DOCTYPE html>\n<html lang="en" class="no-js">\n<head>\n<title>{title}</title>\n',
        *(f'<link rel="preload" href="https://cdn.example.net/{name(rng)}.woff2" as="font">\n' for _ in range(9)),
        *(f'<meta property="og:{name(rng)}" content="{title}">\n' for _ in range(14)),
        f"<style>\n{rules(rng, 60 * bulk)}</style>\n<script>\n{script(rng, 50 * bulk)}</script>\n",
        f'<script type="application/ld+json">{data}</script>\n</head>\n',
    ]
    return "".join(parts)


def name(rng: random.Random) -> str:
    """Return a name as build tools make them."""
    return f"{rng.choice(('app', 'main', 'block', 'widget', 'grid', 'card'))}-{rng.getrandbits(40):010x}"


def some(rng: random.Random, words: list[str], count: int) -> str:
    """Return a few words that stand together in the text."""
    start = rng.randrange(len(words))
    return html.escape(" ".join(words[start : start + count]))


def link(rng: random.Random, words: list[str]) -> str:
    """Return a link with the attributes that scripts hang on it."""
    target = f"/{rng.choice(SECTIONS).lower()}/{name(rng)}.html"
    return f'<a class="link link--{name(rng)}" href="{target}" data-track="{name(rng)}">{some(rng, words, 5)}</a>'


def menu(rng: random.Random, words: list[str], count: int) -> str:
    """Return a bar of navigation."""
    entries = "".join(f'<li class="nav-item"><span>{link(rng, words)}</span></li>\n' for _ in range(count))
    return f'<nav class="nav" aria-label="Sections"><ul>{entries}</ul></nav>\n'


def paragraph(rng: random.Random, text: str) -> str:
    """Return a paragraph with links and emphasis in it, and sometimes an image before it."""
    pieces = html.escape(text, quote=False).split(" ")
    for place in range(rng.randrange(5, 60), len(pieces), 60):
        tag = rng.choice(("em", "strong", f'a href="/wiki/{name(rng)}"'))
        pieces[place] = f"<{tag}>{pieces[place]}</{tag.split()[0]}>"
    figure = ""
    if rng.random() < 0.1:
        source = f"https://images.example.net/{name(rng)}.jpg"
        image = f'<source srcset="{source} 2x"><img src="{source}" alt="A view">'
        figure = f'<figure class="media"><picture>{image}</picture></figure>\n'
    return f'{figure}<p class="body-text" data-id="{name(rng)}">{" ".join(pieces)}</p>\n'


def table(rng: random.Random, words: list[str]) -> str:
    """Return a table of data."""
    rows = "".join(f"<tr><td>{some(rng, words, 2)}</td><td>{rng.randrange(9999)}</td></tr>\n" for _ in range(8))
    return f'<div class="table-wrap"><table class="data"><tr><th>Name</th><th>Number</th></tr>\n{rows}</table></div>\n'


def card(rng: random.Random, words: list[str]) -> str:
    """Return a teaser of another article."""
    body = f'<div class="card__body">{link(rng, words)}<p>{some(rng, words, 18)}</p></div>'
    return f'<div class="card card--{name(rng)}">{body}</div>\n<!-- <img data-src="/t/{name(rng)}.jpg"> -->\n'


def comment(rng: random.Random, words: list[str]) -> str:
    """Return a comment of a reader."""
    body = f"<b>{some(rng, words, 1)}</b><p>{some(rng, words, 40)}</p><button>Reply</button>"
    return f'<div class="comment" id="{name(rng)}">{body}</div>\n'


def rules(rng: random.Random, count: int) -> str:
    """Return rules of style."""
    return "".join(
        f".{name(rng)}{{margin:{rng.randrange(40)}px;color:#{rng.getrandbits(24):06x}}}\n" for _ in range(count)
    )


def script(rng: random.Random, count: int) -> str:
    """Return lines of a script that a build tool has made short."""
    return "".join(
        f'!function(e,t){{e["{name(rng)}"]=t.{rng.choice("abcdef")}({rng.randrange(10**6)})||"<div>"}}(window,n);\n'
        for _ in range(count)
    )


if __name__ == "__main__":
    main()
