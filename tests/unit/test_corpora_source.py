"""Trees of source code, and folders of images by class."""

import marshal
from pathlib import Path

import numpy as np
from corpora import read_corpus, tar, write
from small import png

LOCK = '{\n  "name": "x",\n  "lockfileVersion": 3,\n  "packages": {}\n}\n'
CODE = {
    "README.md": "# birds\n",
    "Makefile": "all:\n\tcc main.c\n",
    "src/main.c": "int main(void) { return 0; }\n",
    "src/app.ts": "export const answer: number = 42;\n",
    "node_modules/left/index.js": "module.exports = 1;\n",
    "vendor/lib.go": "package lib\n",
}
WRITTEN = {
    "package-lock.json": LOCK,
    "go.sum": "github.com/x/y v1.0.0 h1:abc=\ngithub.com/x/y v1.0.0/go.mod h1:def=\n",
    "static/app.min.js": "!function(){var a=1}();\n",
    "static/bundle.js": "var a=1;" * 2_000 + "\n" + "var b=2;" * 2_000,
    "static/bundle.js.map": '{"version":3,"sources":["a.ts"],"mappings":"AAAA"}',
    "src/__pycache__/main.cpython-312.pyc": b"\xcb\r\r\n\0\0\0\0" + marshal.dumps(compile("a = 1", "a", "exec")),
    "lib/libx.so.1.2": b"\x7fELF\2\1\1\0" + bytes(56),
    "vendor/x.jar": b"PK\3\4\0\0" + bytes(20),
    "static/icons.woff": b"wOFF\0\1\0\0" + bytes(20),
    "pkg/__init__.py": b"",
}


def test_of_a_source_tree_what_people_wrote_is_read(tmp_path: Path) -> None:
    corpus = read_corpus(write(tmp_path, CODE | WRITTEN))
    assert sorted(shape[0] for shape in corpus.shapes) == sorted(CODE.values())
    assert not corpus.rejections
    assert corpus.files["set aside"] == {
        "a compiled file (.jar)": 1,
        "a compiled file (.pyc)": 1,
        "a compiled file (.so)": 1,
        "a font (.woff)": 1,
        "a list of locked versions (go.sum)": 1,
        "a list of locked versions (package-lock.json)": 1,
        "a map of generated code (.map)": 1,
        "a minified script (.js)": 2,
        "an empty file": 1,
    }
    assert corpus.files["found"] == len(CODE | WRITTEN)


def test_names_alone_set_nothing_aside(tmp_path: Path) -> None:
    files = {
        "package-lock.json": '{"explains": "how locks are written"}\n',
        "go.sum": "the sum of all that goes\n",
        "notes.class": "notes of the class\n",
        "world.map": "a map of the world\n",
        "long.js": "a();\n" * 3_000,
        "long.txt": "word " * 2_000 + "\n",
    }
    corpus = read_corpus(write(tmp_path, files))
    assert sorted(shape[0] for shape in corpus.shapes) == sorted(files.values())
    assert not corpus.files["set aside"]


def test_a_source_tree_in_an_archive_is_the_same(tmp_path: Path) -> None:
    members = {f"x-1.0/{name}": data.encode() if isinstance(data, str) else data for name, data in WRITTEN.items()}
    members["x-1.0/main.py"] = b"import os\n"
    (tmp_path / "x-1.0.tar").write_bytes(tar(members))
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [["import os\n"]]
    assert sum(corpus.account["set aside"].values()) == len(WRITTEN)


def test_images_whose_folder_may_be_their_class_are_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = {f"train/{name}/{number}.png": png(rng) for name in ("cat", "dog") for number in range(2)}
    corpus = read_corpus(write(tmp_path, {**files, "extra/loose.png": png(rng)}))
    assert corpus.shapes == [["<image>"]] * 5
    assert corpus.files["read"] == {"class-folders": 4, "files": 1}
