"""Files that begin as a corpus does and go on as none: a rejection, or other data, and never the end of a run."""

import itertools
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from corpora import read_corpus, write
from small import png

from megatron_mm.ingest import account

ODD = (None, "x", "", 1.5, True, [], {}, [None], [{}], {"a": 1})
DAMAGED = {
    "captions.json": '{"images": [{"file_name": "a.png"',
    "conversations.json": '[{"image": "a.png"',
    "GigaSpeech.json": '{"audios": [{"segments": [{"begin_time": 1',
    "index.json": '{"chunks"',
    "state.json": "[",
    "00000_stats.json": "[1]",
    "a.stm": "x",
    "results.csv": "a|b\n||||\n",
    "metadata.tsv": "\t\t\n\t\n",
    "short.csv": "a\nb,a.png\nc,a.png\n",
    "quoted.csv": '"a,b\n',
    "docs.jsonl.zip": b"PK\3\4junk",
    "rows.parquet": b"PAR1junkPAR1",
    "a.trans.txt": "a b\n",
    "nul.tex": "\\input{a\0b}\\begin{document}\\includegraphics{\0}",
    "mark.tex": b"\xff\xfe\\begin{document}",
    "a.ipynb": "[",
    "a.mbox": "From x\n",
}


def odd_files() -> Iterator[tuple[str, object]]:
    """Yield (name, JSON) of what begins as each form does; two of its values are of no type that it has."""
    for number, (one, other) in enumerate(itertools.product(ODD, ODD)):
        images = [{"file_name": one, "id": 1}]
        turn, cell = {"from": one, "value": other}, {"cell_type": "code", "source": one, "outputs": other}
        yield from {
            f"coco{number}.json": {"file_name": 1, "images": one, "annotations": other},
            f"image{number}.json": {"images": images, "annotations": [{"caption": other, "image_id": 1}]},
            f"caption{number}.json": {
                "file_name": 1,
                "images": [{}],
                "annotations": [{"caption": one, "image_id": other}],
            },
            f"speech{number}.json": {"audios": [{"path": one, "segments": other}], "begin_time": 1},
            f"talk{number}.json": [{"image": one, "conversations": [turn]}],
            f"line{number}.jsonl": {"file_name": one, "images": other, "text": "x"},
            f"times{number}.jsonl": {"audio": "a.flac", "segments": [{"start": one, "end": 1, "text": other}]},
            f"book{number}.ipynb": {"cells": [cell], "metadata": other},
        }.items()


def test_records_may_be_nested_deeply(tmp_path: Path) -> None:
    line = '{"a":' * 1_000 + '{"image": "a.png"}' + "}" * 1_000 + "\n"
    write(tmp_path, {"a.jsonl": line, "b.json": "[" * 1_020 + '{"image": "a.png"}' + "]" * 1_020})
    write(tmp_path, {"a.png": png(np.random.default_rng(0)), "b.jsonl": "[" * 5_000 + "\n"})
    corpus = read_corpus(tmp_path)
    assert len(corpus.documents) + len(corpus.rejections) >= 2


def test_zips_of_mmc4_may_hold_anything(tmp_path: Path) -> None:
    for number, line in enumerate(
        ("{}", "[]", "1", '{"image_info": 1}', '{"image_info": [1]}', '{"image_info": [{}]}', "{")
    ):
        with zipfile.ZipFile(tmp_path / f"{number}.jsonl.zip", "w") as archive:
            archive.writestr("x.jsonl", line + "\n")
    with zipfile.ZipFile(tmp_path / "deflated.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.jsonl", '{"image_info": []}' * 99)
    data = bytearray((tmp_path / "deflated.jsonl.zip").read_bytes())
    data[40:50] = b"\xff" * 10
    (tmp_path / "deflated.jsonl.zip").write_bytes(data)
    assert len(read_corpus(tmp_path).rejections) >= 6


def test_odd_and_damaged_files_end_no_run(tmp_path: Path) -> None:
    picture = png(np.random.default_rng(0))
    files = {name: json.dumps(said) for name, said in odd_files()} | DAMAGED
    for name, data in files.items():
        write(tmp_path / name.replace(".", "_"), {name: data, "a.png": picture})
    corpus = read_corpus(tmp_path)
    assert corpus.files["found"] == 2 * len(files)
    assert len(corpus.rejections) > 100


@pytest.mark.parametrize("name", DAMAGED)
def test_each_damaged_file_is_accounted_for(tmp_path: Path, name: str) -> None:
    corpus = read_corpus(write(tmp_path, {name: DAMAGED[name]}))
    others = account.total(corpus.account, account.OTHERS) + sum(corpus.files["set aside"].values())
    assert len(corpus.rejections) + len(corpus.documents) + others == 1
