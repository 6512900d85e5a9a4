"""Corpora as their publishers ship them: what belongs together is one document, and every file is accounted for."""

import base64
import gzip
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from corpora import Corpus, read_corpus, tar, write
from small import png, save_tokenizer, tone

from megatron_mm.errors import ConfigError
from megatron_mm.ingest import account
from megatron_mm.ingest.conversations import load_template
from megatron_mm.ingest.document import Document, TextSegment
from megatron_mm.ingest.encode import encode_document
from megatron_mm.ingest.fields import Schemas, load_fields
from megatron_mm.ingest.find import find_files
from megatron_mm.ingest.layouts import Found, Tree
from megatron_mm.ingest.read import read_file
from megatron_mm.ingest.work_items import Options
from megatron_mm.modalities.audio.spec import SAMPLE_RATE, encode_flac
from megatron_mm.tokenizer import TextTokenizer

RNG = np.random.default_rng(0)
PICTURE, OTHER = png(RNG), png(RNG, 32, 32)
SECONDS = 3
FLAC = encode_flac(tone(RNG, SECONDS * SAMPLE_RATE))
Files = Mapping[str, bytes | str]


def shapes(corpus: Corpus) -> list[list[str]]:
    """Return of each document its text, and its media by their modality."""
    return [
        [part.text.strip() if isinstance(part, TextSegment) else part.modality for part in document.segments]
        for document in corpus.documents
    ]


def reasons(corpus: Corpus) -> str:
    """Return what was rejected, and why."""
    return "\n".join(f"{one.path}: {one.reason}" for one in corpus.rejections)


def read(folder: Path, files: Files, *, options: Options | None = None, **find: Any) -> Corpus:
    """Write files below a folder and read it."""
    return read_corpus(write(folder, files), options or Options(), **find)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def arrow(rows: list[dict[str, Any]]) -> bytes:
    table, buffer = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    return buffer.getvalue()


def zipped(files: Files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


WARC = b"""WARC/1.0\r
WARC-Type: conversion\r
WARC-Target-URI: https://example.org/\r
Content-Type: text/plain\r
Content-Length: 4\r
\r
five\r
\r
"""
BASE64 = base64.b64encode(PICTURE).decode()
CUES = "WEBVTT\n\n00:00.000 --> 00:00.900\n<v Ann>Hello there.\n\n00:01.200 --> 00:02.000\nAnd &amp; again.\n"
SRT = "1\n00:00:00,000 --> 00:00:00,900\nHello there.\n\n2\n00:00:01,200 --> 00:00:02,000\nAnd again.\n"
CV_HEAD = "client_id\tpath\tsentence\tlocale\n"
AB = [["image", "a heron"], ["image", "an egret"]]

PAIRED: dict[str, tuple[Files, list[list[str]]]] = {
    "librispeech": (
        {"84/1/84-1-0.flac": FLAC, "84/1/84-1-1.flac": FLAC, "84/1/84-1.trans.txt": "84-1-0 ONE TWO\n84-1-1 THREE\n"},
        [["audio", "ONE TWO"], ["audio", "THREE"]],
    ),
    "a list of recordings in another language and form": (
        {"s/b.opus": FLAC, "s/list.trans.txt": "b vier fünf\n"},
        [["audio", "vier fünf"]],
    ),
    "common voice": (
        {
            "clips/a.flac": FLAC,
            "clips/b.flac": FLAC,
            "validated.tsv": f'{CV_HEAD}x\ta.flac\tHe said "so\ten\n',
            "train.tsv": f"{CV_HEAD}x\ta.flac\tHe said so\ten\n",
            "invalidated.tsv": f"{CV_HEAD}x\tb.flac\tNo\ten\n",
        },
        [["audio"], ["audio", 'He said "so']],
    ),
    "ljspeech": (
        {
            "wavs/LJ-0.flac": FLAC,
            "wavs/LJ-1.flac": FLAC,
            "metadata.csv": "LJ-0|In 1890 it was|In eighteen ninety it was\nLJ-1|Then he went|Then he went\n",
        },
        [["audio", "In 1890 it was"], ["audio", "Then he went"]],
    ),
    "file list of a speech model": (
        {
            "audio/0.flac": FLAC,
            "audio/1.flac": FLAC,
            "train.txt": "audio/0.flac|7|one two\naudio/1.flac|7|three four\n",
        },
        [["audio", "one two"], ["audio", "three four"]],
    ),
    "imagefolder": (
        {
            "train/a.png": PICTURE,
            "train/b.png": PICTURE,
            "train/metadata.csv": 'file_name,text\na.png,"a heron"\nb.png,an egret\n',
        },
        AB,
    ),
    "captions beside a folder of images": (
        {
            "images/a.png": PICTURE,
            "images/b.png": PICTURE,
            "annotations/c.tsv": "image\tcaption\na.png\ta heron\nb.png\tan egret\n",
        },
        AB,
    ),
    "coco": (
        {
            "train2017/1.png": PICTURE,
            "train2017/2.png": PICTURE,
            "annotations/captions.json": json.dumps(
                {
                    "images": [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png"}],
                    "annotations": [{"image_id": 2, "caption": "an egret"}, {"image_id": 1, "caption": "a heron"}],
                }
            ),
        },
        AB,
    ),
    "podcast with vtt": (
        {"ep.flac": FLAC, "ep.vtt": CUES},
        [["audio", "Ann: Hello there.", "audio", "And & again.", "audio"]],
    ),
    "podcast with srt of a language": (
        {"ep.flac": FLAC, "ep.en.srt": SRT},
        [["audio", "Hello there.", "audio", "And again.", "audio"]],
    ),
    "podcast with podcasting 2.0": (
        {
            "ep.flac": FLAC,
            "ep.json": json.dumps(
                {
                    "version": "1.0.0",
                    "segments": [{"speaker": "Host", "startTime": 0, "endTime": 1.5, "body": "Welcome."}],
                }
            ),
        },
        [["audio", "Host: Welcome.", "audio"]],
    ),
    "whisper, all its forms": (
        {
            "e.flac": FLAC,
            "e.srt": SRT,
            "e.vtt": CUES.replace("<v Ann>", ""),
            "e.txt": "Hello there.\n",
            "e.tsv": "start\tend\ttext\n0\t900\tHello there.\n",
            "e.json": json.dumps({"text": " Hello there."}),
        },
        [["audio", "Hello there.", "audio", "And & again.", "audio"]],
    ),
    "whisper's json and tsv alone": (
        {"e.flac": FLAC, "e.tsv": "start\tend\ttext\n0\t900\tHello there.\n"},
        [["audio", "Hello there.", "audio"]],
    ),
    "an image and a conversation": (
        {
            "1.png": PICTURE,
            "1.json": json.dumps(
                {
                    "conversations": [
                        {"from": "human", "value": "<image>\nWhat is it?"},
                        {"from": "gpt", "value": "A heron."},
                    ]
                }
            ),
        },
        [["User:", "image", "What is it?\nAssistant: A heron."]],
    ),
    "an image and json of which one caption is null": (
        {"1.png": PICTURE, "1.json": json.dumps({"text": None, "caption": "a heron"})},
        [["image", "a heron"]],
    ),
    "an image and an empty text": ({"1.png": PICTURE, "1.txt": ""}, [["image"]]),
    "an image and a text of nothing": ({"1.png": PICTURE, "1.txt": "\n \n"}, [["image"]]),
    "an image and its name with .txt": ({"1.png": PICTURE, "1.png.txt": "a heron"}, [["image", "a heron"]]),
    "an image and a .caption": ({"1.png": PICTURE, "1.caption": "a heron"}, [["image", "a heron"]]),
    "img2dataset": (
        {
            "00000.tar": tar(
                {"0.png": PICTURE, "0.txt": "a heron", "0.json": json.dumps({"caption": "a heron", "url": "u"})}
            ),
            "00000.parquet": parquet([{"url": "u", "key": "0", "status": "success", "caption": "a heron"}] * 2),
            "00000_stats.json": json.dumps({"count": 2, "successes": 1}),
        },
        [["image", "a heron"]],
    ),
    "img2dataset, folders": (
        {
            "00000/0.png": PICTURE,
            "00000/0.txt": "a heron",
            "00000/0.json": json.dumps({"caption": "a heron"}),
            "00000.parquet": parquet([{"url": "u", "key": "0", "status": "success", "caption": "a heron"}]),
        },
        [["image", "a heron"]],
    ),
    "webdataset, keys up to the first dot": (
        {
            "x.tar": tar(
                {
                    "0.image.png": PICTURE,
                    "0.caption.txt": "a heron",
                    "1.png": PICTURE,
                    "1.cls": "egret",
                    "2.left.png": PICTURE,
                    "2.right.png": OTHER,
                    "2.npy": b"\x93NUMPY",
                }
            )
        },
        [["image", "a heron"], ["image", "egret"], ["image", "image"]],
    ),
    "mmc4": (
        {
            "images/b.png": PICTURE,
            "docs/d.jsonl.zip": zipped(
                {
                    "d.jsonl": lines(
                        {
                            "text_list": ["One.", "Two."],
                            "image_info": [{"image_name": "b.png", "matched_text_index": 1}],
                        }
                    )
                }
            ),
        },
        [["One.", "image", "Two."]],
    ),
    "obelics, images of its own": (
        {"x.parquet": parquet([{"texts": [None, "after"], "images": [{"bytes": PICTURE, "path": None}, None]}])},
        [["image", "after"]],
    ),
    "obelics, images by address": (
        {"x.parquet": parquet([{"texts": [None, "after"], "images": ["https://e.org/a.jpg", None]}])},
        [["after"]],
    ),
    "the cauldron": (
        {
            "x.parquet": parquet(
                [
                    {
                        "images": [{"bytes": PICTURE, "path": None}],
                        "texts": [{"user": "What?", "assistant": "A heron.", "source": "s"}],
                    }
                ]
            )
        },
        [["image", "User: What?\nAssistant: A heron."]],
    ),
    "c4": ({"c4.json": lines({"text": "one", "url": "u"}, {"text": "two", "url": "v"})}, [["one"], ["two"]]),
    "json lines named .txt": ({"x.txt": lines({"text": "one"}, {"text": "two"})}, [["one"], ["two"]]),
    "a json array": ({"x.json": json.dumps([{"text": "one"}, {"text": "two"}], indent=1)}, [["one"], ["two"]]),
    "alpaca": (
        {"x.json": json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3", "text": "all of it"}])},
        [["Add.", "1 2", "3"]],
    ),
    "json of settings": ({"package.json": '{"name": "x"}\n', "a.json": "[1, 2]"}, [["[1, 2]"], ['{"name": "x"}']]),
    "common voice of the hub": (
        {"x.parquet": parquet([{"path": "0.mp3", "audio": {"bytes": FLAC, "path": "0.mp3"}, "sentence": "Hello."}])},
        [["audio", "Hello."]],
    ),
    "fleurs of the hub": (
        {
            "x.parquet": parquet(
                [{"audio": {"bytes": FLAC, "path": None}, "transcription": "hello", "raw_transcription": "Hello!"}]
            )
        },
        [["audio", "Hello!"]],
    ),
    "vqa of the hub": (
        {
            "x.parquet": parquet(
                [{"image": {"bytes": PICTURE, "path": None}, "question": "What?", "answer": "A heron."}]
            )
        },
        [["image", "What?", "A heron."]],
    ),
    "save_to_disk": (
        {
            "d/state.json": json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}),
            "d/dataset_info.json": "{}",
            "d/data-0.arrow": arrow([{"text": "one"}, {"text": "two"}]),
            "d/cache-1.arrow": arrow([{"text": "old"}]),
        },
        [["one"], ["two"]],
    ),
    "an arrow file alone": ({"x.arrow": arrow([{"text": "one"}])}, [["one"]]),
    "a page and its image": (
        {"page.html": "<p>before</p><img src='page_files/a%20b.png'><p>after</p>", "page_files/a b.png": PICTURE},
        [["before", "image", "after"]],
    ),
    "json lines and the images that they name": (
        {"x.jsonl": lines({"image": "i/a.png", "text": "a heron"}), "i/a.png": PICTURE},
        [["image", "a heron"]],
    ),
    "llava": (
        {
            "x.json": json.dumps(
                [
                    {
                        "id": "1",
                        "image": "i/a.png",
                        "conversations": [
                            {"from": "human", "value": "What?\n<image>"},
                            {"from": "gpt", "value": "A heron."},
                        ],
                    }
                ]
            ),
            "i/a.png": PICTURE,
        },
        [["User: What?", "image", "Assistant: A heron."]],
    ),
    "images in base64": (
        {
            "x.jsonl": lines(
                {"image": "data:image/png;base64," + BASE64, "text": "one"}, {"image": BASE64, "text": "two"}
            )
        },
        [["image", "one"], ["image", "two"]],
    ),
}
"""What lies in a folder, and its documents: of each kind one as it was found to be read wrongly, and more."""


@pytest.mark.parametrize("name", PAIRED)
def test_what_belongs_together_is_one_document(name: str, tmp_path: Path) -> None:
    files, expected = PAIRED[name]
    corpus = read(tmp_path, files)
    assert not reasons(corpus)
    assert shapes(corpus) == expected


def test_what_is_set_aside_is_said(tmp_path: Path) -> None:
    files = dict(PAIRED["img2dataset"][0]) | {f"cv/{name}": data for name, data in PAIRED["common voice"][0].items()}
    corpus = read(tmp_path, files | {"empty.txt": "", ".hidden": "x"})
    assert corpus.files["set aside"] == {
        "img2dataset's table of a download": 1,
        "img2dataset's statistics of a download": 1,
        "a split of Common Voice's validated.tsv, which is read": 1,
        "Common Voice's clips that were not validated": 1,
        "an empty file": 1,
    }
    assert corpus.files["passed over"] == {"hidden files, and files in hidden folders": 1}
    assert corpus.account[account.NOT_USED] == {"client_id": 1, "locale": 1}
    assert corpus.account[account.USED] == {"path": 1, "sentence": 1}


REFUSED: dict[str, tuple[Files, str]] = {
    "coyo": (
        {"x.parquet": parquet([{"url": "http://e.org/0.jpg", "text": "a heron", "width": 3, "height": 4}])},
        "the addresses of images and not the images",
    ),
    "laion": (
        {"x.parquet": parquet([{"URL": "http://e.org/0.jpg", "TEXT": "a heron", "WIDTH": 3, "HEIGHT": 4}])},
        "the addresses of images and not the images",
    ),
    "coyo in json lines": (
        {"x.jsonl": lines({"url": "http://e.org/0.jpg", "text": "a heron", "width": 3, "height": 4})},
        "the addresses of images and not the images",
    ),
    "a video that is none": (
        {"x.parquet": parquet([{"video": {"bytes": b"xx", "path": "v.mp4"}, "text": "a film"}])},
        "the video is damaged",
    ),
    "media in a column that nobody knows": (
        {"x.parquet": parquet([{"thumb": {"bytes": PICTURE, "path": None}, "text": "a heron"}])},
        "its field 'thumb' holds media, and as 'image, audio, video or text' it is not read. Say which columns",
    ),
    "a file that a field of another name names": (
        {"x.jsonl": lines({"picture": "a.png", "text": "a heron"})},
        "its field 'picture' holds media",
    ),
    "an image that is not there": (
        {"x.jsonl": lines({"image": "a.png", "text": "x"})},
        "image 'a.png': it is not there",
    ),
    "columns that nobody knows": ({"x.parquet": parquet([{"a": "b"}])}, "its columns are ['a'], and none is known"),
    "a table of media and no text": (
        {"a.png": PICTURE, "b.png": PICTURE, "m.csv": "file_name,score\na.png,1\nb.png,2\n"},
        "its column 'file_name' names files, and none of ['file_name', 'score'] is known to be their text",
    ),
    "litdata": (
        {"index.json": '{"chunks": [], "config": {}}', "chunk-0-0.bin": b"\0\1"},
        "it belongs to a LitData set",
    ),
    "mds": ({"index.json": '{"shards": [], "version": 2}', "shard.0.mds": b"\0"}, "it belongs to a MosaicML Streaming"),
    "tfrecord": ({"a.tfrecord": b"\x01\0\0"}, "it is named as a container (.tfrecord)"),
    "tokens of megatron": ({"t.bin": b"\0\0", "t.idx": b"MMIDIDX\0\0" + bytes(30)}, "tools/shards.py adopt"),
    "a json array that is cut off": ({"x.json": '[{"text": "one"}, {"text": "tw'}, "the JSON array is damaged"),
    "a conversation of the wrong form": (
        {"x.jsonl": lines({"conversations": [{"who": "me"}]})},
        "a turn has ['who'], not `from` and `value`",
    ),
    "more placeholders than images": (
        {"x.jsonl": lines({"conversations": [{"from": "human", "value": "<image><image>"}], "image": "a.png"})},
        "conversations has 2 <image>, and the record 1 of that kind",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_understood_is_refused_by_name(name: str, tmp_path: Path) -> None:
    files, reason = REFUSED[name]
    corpus = read(tmp_path, files)
    assert reason in reasons(corpus)
    assert not any("text" in document.source.name.lower() for document in corpus.documents)


def test_recordings_without_words_and_words_without_recordings_are_both_there(tmp_path: Path) -> None:
    corpus = read(tmp_path, {"a.flac": FLAC, "b.flac": FLAC, "l.trans.txt": "a ONE\nc THREE\n"})
    assert shapes(corpus) == [["audio"], ["audio", "ONE"]]
    assert reasons(corpus) == f"{tmp_path}/l.trans.txt, row 2: name 'c': it is not there"


def test_a_layout_that_loses_a_file_or_takes_it_twice_fails_the_run(tmp_path: Path) -> None:
    found = [Found(write(tmp_path, {name: "x"}) / name) for name in ("a.txt", "b.txt")]
    tree = Tree(found)
    tree.take(found[0].path)
    with pytest.raises(AssertionError, match=r"b\.txt, 0 times"):
        tree.arranged()
    tree.set_aside(found[1].path, "a thing")
    assert tree.arranged().with_others == 0
    tree.use(found[0].path)
    with pytest.raises(AssertionError, match=r"a\.txt, 2 times"):
        tree.arranged()


def test_a_file_of_several_names_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.txt": "one", "b/c.txt": "two"})
    (tmp_path / "in" / "again.txt").hardlink_to(tmp_path / "in" / "a.txt")
    found = find_files([str(tmp_path / "in"), str(tmp_path / "in" / "b"), str(tmp_path / "in" / "a.txt")])
    assert [one.path.name for one in found.files] == ["a.txt", "c.txt"]
    assert found.passed_over == {"other names of files that are read": 3}


def test_what_a_run_writes_and_its_tokenizer_are_no_inputs(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"a.txt": "one", "t.json": "{}", "out/p.bin": b"x", "out/p-00000-of-00002.idx": b"x", "out/q.txt": "q"},
    )
    found = find_files([str(tmp_path)], output_prefix=str(tmp_path / "out" / "p"), tokenizer=str(tmp_path / "t.json"))
    assert [one.path.name for one in found.files] == ["a.txt", "q.txt"]
    assert found.passed_over == {"files that this tool writes, and its tokenizer": 3}


def test_the_cache_of_the_hub_is_read_by_its_names(tmp_path: Path) -> None:
    hub = write(
        tmp_path / "datasets--x--y", {"blobs/0": PICTURE, "blobs/1": "a heron", "blobs/2": lines({"text": "one"})}
    )
    snapshot = hub / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("a.png", "a.txt", "x.jsonl")):
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    write(hub, {"refs/main": "abc"})
    for folder in (hub, hub / "snapshots"):
        corpus = read_corpus(folder)
        assert shapes(corpus) == [["image", "a heron"], ["one"]] and not reasons(corpus)
    aside = {"a blob of the hub's cache, which is read by its name in snapshots/": 3}
    assert read_corpus(hub).files["set aside"] == aside | {"the name of a revision in the hub's cache": 1}


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    record, row = lines({"text": "one"}).encode(), {"text": "two"}
    files = {
        **{b".parquet": parquet([row]), b".arrow": arrow([row]), b".tar": tar({"a.txt": "three"})},
        **{
            b".jsonl.gz": gzip.compress(record),
            b".json.zst": pa.compress(record * 2, codec="zstd", asbytes=True),
            b".jsonl": record,
        },
        **{b".csv": b"file_name,text\n", b".html": b"<p>four", b".png": PICTURE, b".warc.gz": gzip.compress(WARC)},
    }
    for suffix, data in files.items():
        Path(str(tmp_path), (b"caf\xe9" + suffix).decode("utf-8", "surrogateescape")).write_bytes(data)
    corpus = read_corpus(tmp_path)
    assert not reasons(corpus)
    texts = ["file_name,text", "five", "four", "image", *["one"] * 4, "three", "two", "two"]
    assert sorted(shape[0] for shape in shapes(corpus)) == sorted(texts)


def test_one_layout_can_be_asked_for(tmp_path: Path) -> None:
    files = PAIRED["podcast with vtt"][0]
    assert shapes(read(tmp_path, files, options=Options(layout="pairs"))) == PAIRED["podcast with vtt"][1]
    alone = read(tmp_path, files, options=Options(layout="files"))
    assert [shape[0] for shape in shapes(alone)] == ["audio", CUES.strip()]
    with pytest.raises(ConfigError, match="--layout nope is none of empty, "):
        read(tmp_path, files, options=Options(layout="nope"))


def test_fields_of_ones_own_say_what_is_what(tmp_path: Path) -> None:
    yaml = write(
        tmp_path, {"f.yaml": "parts: [{text: title}, {image: thumb, folder: pics, suffix: .png}, {text: [b, c]}]"}
    )
    options = Options(schemas=Schemas(load_fields(yaml / "f.yaml")))
    records = lines({"title": "One", "thumb": "a", "c": "end", "text": "not this"})
    corpus = read(tmp_path / "in", {"x.jsonl": records, "pics/a.png": PICTURE}, options=options)
    assert shapes(corpus)[-1] == ["One", "image", "end"]
    assert corpus.account[account.NOT_USED] == {"text": 1}


@pytest.mark.parametrize(
    ("yaml", "reason"),
    [
        ("parts: [{txt: a}]", r"0\.parts\.0\.txt: Extra inputs are not permitted"),
        ("parts: {", "is not YAML"),
        ("3", "Input should be a valid dictionary"),
    ],
)
def test_wrong_fields_are_refused(yaml: str, reason: str, tmp_path: Path) -> None:
    write(tmp_path, {"f.yaml": yaml})
    with pytest.raises(ConfigError, match=reason):
        load_fields(tmp_path / "f.yaml")


def test_a_long_array_is_read_in_parts_as_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mm.ingest import work_items

    records = [{"text": f"número {number}", "deep": {"a": [1, "]"]}} for number in range(300)]
    files = {"x.json": json.dumps(records, indent=2, ensure_ascii=False)}
    whole = read(tmp_path, files)
    assert len(whole.documents) == 300
    data = files["x.json"].encode()
    for document, record in zip(whole.documents, records, strict=True):
        assert json.loads(data[document.origin.start : document.origin.stop]) == record
    monkeypatch.setattr(work_items, "ARCHIVE_BYTES", 1_000)
    monkeypatch.setattr(work_items, "LINES_BYTES", 700)
    assert read_corpus(tmp_path).documents == whole.documents


def test_a_long_table_is_cut_into_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mm.ingest import work_items

    files = {f"i/{number}.png": png(RNG) for number in range(9)}
    files["m.csv"] = "file_name,text\n" + "".join(f"i/{number}.png,picture {number}\n" for number in range(9))
    whole = read(tmp_path, files)
    assert [shape[1] for shape in shapes(whole)] == [f"picture {number}" for number in range(9)]
    monkeypatch.setattr(work_items, "ARCHIVE_BYTES", 1_000)
    assert read_corpus(tmp_path).documents == whole.documents


def test_a_member_of_an_archive_is_named(tmp_path: Path) -> None:
    inner = zipped({"deep/a.txt": "one"})
    documents, _ = read_file(write(tmp_path, {"x.tar": tar({"b.zip": inner})}) / "x.tar")
    assert [document.origin.member for document in documents] == ["b.zip/deep/a.txt"]


QWEN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
)


def test_a_conversation_is_written_by_the_template_beside_the_tokenizer(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "tokenizer.json")
    state = json.loads(path.read_text())
    first = 1 + max(token["id"] for token in state["added_tokens"])
    for number, token in enumerate(("<|im_start|>", "<|im_end|>")):
        state["added_tokens"].append(state["added_tokens"][0] | {"id": first + number, "content": token})
    path.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="nor a chat_template in .* write conversations plainly"):
        load_template(path)
    write(tmp_path, {"tokenizer_config.json": json.dumps({"chat_template": QWEN})})
    options = Options(schemas=Schemas(template=load_template(path)))
    human, gpt = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A heron."}
    records = [{"conversations": [human, gpt], "image": "a.png"}]
    records += [
        {"conversations": [{"role": "tool", "content": "x"}]},
        {"conversations": [gpt | {"value": "<|im_end|>"}]},
    ]
    corpus = read(tmp_path / "in", {"x.jsonl": lines(*records), "a.png": PICTURE}, options=options)
    assert "a turn spells <|im_end|>" in reasons(corpus) and "the chat template does not take it: no tools" in reasons(
        corpus
    )
    tokenizer = TextTokenizer(path)
    (document,) = corpus.documents
    ids = encode_document(document, tokenizer).tokens.tolist()
    image = encode_document(Document([document.segments[2]], document.source), tokenizer).tokens.tolist()[:-1]
    start, end = tokenizer.special_id("<|im_start|>"), tokenizer.special_id("<|im_end|>")
    asked = [start, *tokenizer.encode("user\n"), *image, *tokenizer.encode("What?"), end, *tokenizer.encode("\n")]
    answered = [start, *tokenizer.encode("assistant\nA heron."), end, *tokenizer.encode("\n")]
    assert ids == [*asked, *answered, tokenizer.special_ids["end_of_text"]]
