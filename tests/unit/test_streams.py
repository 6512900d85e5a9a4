"""Streams: compressed records of any size, read once and in order, as the same records in a plain file."""

import bz2
import gzip
import json
import lzma
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from backports import zstd
from corpora import Serial
from small import save_tokenizer, sentence

from megatron_mm.errors import DataError
from megatron_mm.ingest import archive, compression, kinds, pipeline, streams, work_items
from megatron_mm.ingest.compression import Blocks
from megatron_mm.ingest.layouts import Entry
from megatron_mm.ingest.pipeline import preprocess
from megatron_mm.ingest.plan import Share
from megatron_mm.ingest.read import read_file
from megatron_mm.ingest.report import Report
from megatron_mm.ingest.streams import kind_of_stream, pieces
from megatron_mm.ingest.work_items import WorkItem, cut_entry, cut_work
from megatron_mm.ingest.workers import Failure, Workers
from megatron_mm.shards import ShardReader, open_shards

Compress = Callable[[bytes], bytes]
FORMATS: dict[str, Compress] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}


@pytest.fixture(params=FORMATS)
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


def lines_of(count: int, *, seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    return b"".join(
        json.dumps({"text": sentence(rng, int(rng.integers(1, 30)))}).encode() + b"\n" for _ in range(count)
    )


def run(folder: Path, prefix: Path, **options) -> Report:
    tokenizer = folder.parent / "tokenizer.json"
    if not tokenizer.exists():
        save_tokenizer(tokenizer)
    return preprocess([str(folder)], output_prefix=str(prefix), tokenizer_path=str(tokenizer), **options)


def tokens_of(prefix: Path) -> list[list[int]]:
    shards = open_shards([str(prefix)])
    return [shard.tokens(number).tolist() for shard in shards for number in range(shard.num_documents)]


# Bytes


def test_members_and_zeros_behind_them_are_one_stream(tmp_path: Path, suffix: str) -> None:
    compress, path = FORMATS[suffix], tmp_path / "x"
    for parts in ([b"one"], [b"one", b"two" * 10**6, b"three"]):
        path.write_bytes(b"".join(map(compress, parts)))
        assert b"".join(Blocks(path)) == b"".join(parts)
        path.write_bytes(path.read_bytes() + bytes(compression.READ_BYTES + 512))
        assert b"".join(Blocks(path)) == b"".join(parts)


def test_a_block_is_no_longer_than_it_may_be(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "x").write_bytes(FORMATS[suffix](bytes(40 * 2**20)))
    sizes = [len(block) for block in Blocks(tmp_path / "x")]
    assert max(sizes) <= compression.BLOCK_BYTES and sum(sizes) == 40 * 2**20


@pytest.mark.parametrize(("damage", "words"), [("cut", "cut off: it ends at byte"), ("more", "damaged at byte")])
def test_what_is_before_damage_is_read_and_its_place_is_said(
    tmp_path: Path, suffix: str, damage: str, words: str
) -> None:
    whole = FORMATS[suffix](lines_of(2000))
    data = whole[: len(whole) - 9] if damage == "cut" else whole + b"rubbish"
    (tmp_path / "x").write_bytes(data)
    read = bytearray()
    with pytest.raises(DataError, match=f"{words} {len(whole) if damage == 'more' else len(data):,}"):
        for block in Blocks(tmp_path / "x"):
            read += block
    assert lines_of(2000).startswith(read)
    assert damage == "cut" or len(read) == len(lines_of(2000))


def test_a_wrong_checksum_is_damage(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(b"text" * 1000))
    data[-8] ^= 1
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DataError, match="checksum"):
        list(Blocks(tmp_path / "x"))


# Pieces


def reference_pieces(data: bytes, end: bytes, num_bytes: int) -> list[bytes]:
    """The cutter as it is defined: records are added to a piece until it is long enough."""
    records = [record + end for record in data.split(end)]
    records[-1] = records[-1][: -len(end)]
    found, held = [], b""
    for record in records:
        held += record
        if len(held) >= num_bytes and held.endswith(end):
            found.append(held)
            held = b""
    return [*found, held] if held else found


@pytest.mark.parametrize("kind", [kinds.JSONL, kinds.WIKI], ids=["lines", "pages"])
@pytest.mark.parametrize("block_bytes", [1, 7, 100, 10_000])
def test_pieces_are_cut_as_they_are_defined(
    tmp_path: Path, kind: kinds.Kind, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "BLOCK_BYTES", block_bytes)
    rng, end = np.random.default_rng(block_bytes), streams.ENDS[kind]
    for tail in (b"", b"rest", end):
        data = b"".join(b"x" * int(rng.integers(0, 90)) + end for _ in range(60)) + tail
        (tmp_path / "x.gz").write_bytes(gzip.compress(data))
        found = list(pieces(tmp_path / "x.gz", kind, num_bytes=100))
        assert [piece.data for piece in found] == reference_pieces(data, end, 100)
        starts = np.cumsum([0, *(len(piece.data) for piece in found)])
        assert [piece.start for piece in found] == starts[:-1].tolist()
        assert [piece.first for piece in found] == [1 + data[:start].count(end) for start in starts[:-1]]
        assert sum(piece.num_read for piece in found) <= (tmp_path / "x.gz").stat().st_size


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl"])
@pytest.mark.parametrize("place", [0, 3, 40, 99])
def test_a_record_that_does_not_fit_into_memory_costs_itself(
    tmp_path: Path, name: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "Workers", Serial)
    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 50_000)
    monkeypatch.setattr(work_items, "MAX_RECORD_BYTES", 50_000)
    monkeypatch.setattr(compression, "BLOCK_BYTES", 1_000)
    monkeypatch.setattr(work_items, "LINES_BYTES", 1_000)
    lines = lines_of(100).splitlines(keepends=True)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jsonl").write_bytes(b"".join(lines[:place] + lines[place + 1 :]))
    run(tmp_path / "in", tmp_path / "good")
    (tmp_path / "in" / "good.jsonl").unlink()
    lines[place] = json.dumps({"text": "long " * 20_000}).encode() + b"\n"
    data = b"".join(lines)
    (tmp_path / "in" / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    report = run(tmp_path / "in", tmp_path / "out", skip_bad=True)
    assert [one.path for one in report.rejections] == [f"{tmp_path}/in/{name}:{place + 1}"]
    assert "MiB" in report.rejections[0].reason
    assert tokens_of(tmp_path / "out") == tokens_of(tmp_path / "good")


def test_what_is_a_stream_its_content_says(tmp_path: Path) -> None:
    def kind_of(name: str, data: bytes) -> kinds.Kind | None:
        (tmp_path / name).write_bytes(data)
        return kind_of_stream(tmp_path / name)

    lines = lines_of(10)
    assert kind_of("c4-train.00000.json.gz", gzip.compress(lines)) == kinds.JSONL
    assert kind_of("0a1b2c", gzip.compress(lines)) == kinds.JSONL
    assert kind_of("x.jsonl.zst", gzip.compress(lines)) == kinds.JSONL, "either is a name of compressed files"
    assert kind_of("x.json.gz", gzip.compress(b"[" + lines.replace(b"\n", b",\n")[:-2] + b"]")) is None
    assert kind_of("x.csv.gz", gzip.compress(b"a,b\n1,2\n")) is None
    assert kind_of("x.txt.gz", gzip.compress(b"a story\n")) is None
    assert kind_of("x.jsonl.gz", gzip.compress(bytes(range(256)) * 9)) is None, "its reader says what is wrong"
    assert kind_of("y.jsonl.gz", gzip.compress(lines)[:5]) is None
    assert kind_of("y.jsonl", lines) is None, "plain lines are ranges of bytes"


# Runs


def test_a_compressed_file_gives_the_shards_of_a_plain_one(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "Workers", Serial)
    monkeypatch.setattr(work_items, "LINES_BYTES", 3_000)
    lines = lines_of(300).splitlines(keepends=True)
    lines[17], lines[203] = b'{"text": 3}\n', b"{\n"
    lines[204] = b'{"segments": [{"text": "one "}, {"text": "two"}]}\n'
    data = b"".join(lines)
    for name, content in (("x.jsonl", data), (f"x.jsonl{suffix}", FORMATS[suffix](data))):
        (tmp_path / suffix / name).mkdir(parents=True)
        (tmp_path / suffix / name / name).write_bytes(content)
    plain, packed = (run(path, tmp_path / path.name, skip_bad=True) for path in sorted((tmp_path / suffix).iterdir()))
    assert tokens_of(tmp_path / "x.jsonl") == tokens_of(tmp_path / f"x.jsonl{suffix}")
    starts, stops = (
        [ShardReader(tmp_path / name).origins(0, 298).column(column) for name in ("x.jsonl", f"x.jsonl{suffix}")]
        for column in ("start", "stop")
    )
    assert starts[0] == starts[1] and stops[0] == stops[1], "places in what it unpacks to"
    assert data[starts[0][40] : stops[0][40]] == lines[41].rstrip(b"\n")
    assert plain.account == packed.account
    assert packed.num_inputs > 5, "it is read in pieces"
    assert [one.path.rpartition(":")[2] for one in packed.rejections] == ["18", "204"]
    assert [one.reason for one in packed.rejections] == [one.reason for one in plain.rejections]


def test_the_records_before_damage_are_kept_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "Workers", Serial)
    monkeypatch.setattr(work_items, "LINES_BYTES", 3_000)
    lines = lines_of(300)
    (tmp_path / "in").mkdir()
    data = gzip.compress(lines)[:-2_000]
    (tmp_path / "in" / "x.jsonl.gz").write_bytes(data)
    report = run(tmp_path / "in", tmp_path / "out", skip_bad=True)
    (rejection,) = report.rejections
    count = report.counts.documents
    assert 100 < count < 300
    assert rejection.path == f"{tmp_path}/in/x.jsonl.gz"
    assert rejection.reason == (
        f"it is cut off: it ends at byte {len(data):,}, within its data. The {count} records before are read"
    )
    with pytest.raises(DataError, match="cut off"):
        run(tmp_path / "in", tmp_path / "other")


@pytest.mark.parametrize("tasks", [2, 5])
def test_a_stream_belongs_to_the_task_that_it_begins_in(
    tmp_path: Path, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "Workers", Serial)
    monkeypatch.setattr(work_items, "LINES_BYTES", 2_000)
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines_of(90 + number, seed=number)))
    run(tmp_path / "in", tmp_path / "whole")
    found: list[list[int]] = []
    for task in range(tasks):
        report = run(tmp_path / "in", tmp_path / "p", share=Share(task, tasks))
        assert report.counts.documents in (0, 90, 91, 92, 90 + 91, 91 + 92)
        if report.counts.documents:
            found += tokens_of(Path(Share(task, tasks).prefix(str(tmp_path / "p"))))
    assert found == tokens_of(tmp_path / "whole")


def make_dying() -> Callable[[WorkItem], bytes]:
    def read(work: WorkItem) -> bytes:
        data = work.read()
        if b"die here" in data:
            os.kill(os.getpid(), signal.SIGKILL)
        return data

    return read


def test_a_line_that_crashes_its_worker_costs_itself(tmp_path: Path) -> None:
    lines = lines_of(40).splitlines(keepends=True)
    lines[11] = b'{"text": "die here"}\n'
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    items = list(cut_entry(Entry(tmp_path / "x.jsonl.gz", "files")))
    with Workers(1, make_dying, split=cut_work) as workers:
        results = list(workers.run(items))
    assert [result for _, result in results if not isinstance(result, Failure)] == lines[:11] + lines[12:]
    assert [item.place for item, result in results if isinstance(result, Failure)] == [f"{tmp_path}/x.jsonl.gz:12"]
    assert results[-1][0].ends and not results[0][0].ends


# Other compressed files


def test_a_document_is_unpacked_whatever_follows_it(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.txt{suffix}").write_bytes(FORMATS[suffix](b"a story\n") + bytes(512))
    (document,), rejections = read_file(tmp_path / f"a.txt{suffix}")
    assert document.segments[0].text == "a story\n" and not rejections


def test_what_is_no_stream_and_too_long_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 10_000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a story\n" * 2_000))
    _, (rejection,) = read_file(tmp_path / "a.txt.gz")
    assert "unpack it, and give what comes of it to --input" in rejection.reason
