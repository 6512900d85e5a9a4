"""Trees of source code: what tools have written into them is no text of anyone.

Lists of locked versions, compiled files and maps of generated code are told by name and content, minified scripts by
their name or by lines that nobody writes. Every other file is read, whatever its folder is called.
"""

import re
from pathlib import Path

from megatron_mm.ingest.layouts.tree import Tree

LOCKS = {
    "package-lock.json": b'"lockfileVersion"',
    "npm-shrinkwrap.json": b'"lockfileVersion"',
    "yarn.lock": b"resolved",
    "pnpm-lock.yaml": b"lockfileVersion",
    "bun.lock": b'"lockfileVersion"',
    "deno.lock": b'"version"',
    "Cargo.lock": b"[[package]]",
    "poetry.lock": b"[[package]]",
    "uv.lock": b"[[package]]",
    "pdm.lock": b"[[package]]",
    "Pipfile.lock": b'"_meta"',
    "composer.lock": b'"content-hash"',
    "Gemfile.lock": b"specs:",
    "Podfile.lock": b"PODS:",
    "pubspec.lock": b"packages:",
    "mix.lock": b"%{",
    "flake.lock": b'"nodes"',
    "packages.lock.json": b'"dependencies"',
    "go.sum": b" h1:",
}
"""Names of lists of locked versions, and what stands in each."""
COMPILED = re.compile(
    r"\.(pyc|pyo|pyd|so(\.\d+)*|o|obj|a|lib|lo|class|jar|war|dll|exe|dylib|wasm|pdb|elc|beam|node|ko|gch|pch)$",
    re.IGNORECASE,
)
FONTS = (".ttf", ".otf", ".woff", ".woff2", ".eot", ".pfb", ".tfm", ".pcf")
SCRIPTS = (".js", ".mjs", ".cjs", ".css")
LONG_LINE = 5_000
"""Characters of a line on average above which a script is taken to be minified."""
HEAD_BYTES = 2**20


def arrange(tree: Tree) -> None:
    """Set aside what tools have written, by what it is."""
    for path in tree.all():
        if what := _is_written_by_tools(path):
            tree.set_aside(path, what)


def _is_written_by_tools(path: Path) -> str:
    """Return what a file is that no person wrote, "" for any other."""
    name, suffix = path.name, path.suffix.lower()
    if name in LOCKS:
        return f"a list of locked versions ({name})" if LOCKS[name] in _head(path) else ""
    if compiled := COMPILED.search(name):
        ending = compiled[1].partition(".")[0].lower()
        return f"a compiled file (.{ending})" if b"\0" in _head(path) else ""
    if suffix in FONTS:
        return f"a font ({suffix})" if b"\0" in _head(path) else ""
    if suffix == ".map":
        start = _head(path)
        return "a map of generated code (.map)" if b'"mappings"' in start and b'"version"' in start else ""
    if suffix in SCRIPTS and (name.lower().endswith(f".min{suffix}") or _average_line(path) > LONG_LINE):
        return f"a minified script ({suffix})"
    return ""


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _average_line(path: Path) -> float:
    start = _head(path).strip()
    return len(start) / (start.count(b"\n") + 1)
