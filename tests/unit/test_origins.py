"""Where documents came from: every origin leads back to its text, and nothing but those who ask for it needs it."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from corpora import Serial
from small import VOCAB_SIZE, save_tokenizer, write_shards

from megatron_mm import config as configs
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.hf.files import model_card
from megatron_mm.ingest import pipeline, work_items
from megatron_mm.ingest.deduplicate import deduplicate
from megatron_mm.ingest.listing import list_documents, render_one, render_table
from megatron_mm.ingest.pipeline import preprocess
from megatron_mm.shards import (
    EncodedBatch,
    EncodedDocument,
    Origins,
    ShardReader,
    ShardWriter,
    TokenizerInfo,
    fingerprints,
    merge,
    open_shards,
    origin_file,
)
from megatron_mm.shards.origins import COLUMNS
from megatron_mm.source import Source
from megatron_mm.tokenizer import TextTokenizer

INFO = TokenizerInfo("0" * 64, VOCAB_SIZE, {"image": 10, "audio": 11})


def jsonl(name: str, count: int) -> bytes:
    """Lines of which every third says where it is from, and every fifth is more than text."""
    lines = []
    for number in range(count):
        line: dict = {"text": f"red {name} {number}\n"}
        if number % 3 == 0:
            line |= {"url": f"https://a.b/{number}", "license": "CC0", "timestamp": 1700000000 + number}
        lines.append({"segments": [line], "licence": "MIT"} if number % 5 == 4 else line)
    return b"\r\n".join(json.dumps(line).encode() for line in lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of files that hold several documents, and the shards of it."""
    root = tmp_path_factory.mktemp("origins")
    tokenizer, folder = save_tokenizer(root / "tokenizer.json"), root / "in"
    folder.mkdir()
    (folder / "alone.txt").write_text("a hill by the lake\n")
    (folder / "lines.jsonl").write_bytes(jsonl("house", 40) + b"\n\nnot json\n" + b'{"text": "small bird"}')
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(jsonl("tall", 7)))
    texts = [f"the blue row {number}\n" for number in range(9)]
    when = pyarrow.array([1_700_000_000 + number for number in range(9)], pyarrow.timestamp("s"))
    table = {"text": texts, "url": [None, *[f"https://c.d/{n}" for n in range(8)]], "date": when, "score": [0.5] * 9}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "rows.parquet", row_group_size=4)
    with zipfile.ZipFile(folder / "all.zip", "w") as outer:
        outer.writestr("deep/a.txt", "sees over\n")
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w") as tar:
            for name, data in (("x/b.txt", b"sings under\n"), ("x/c.jsonl", jsonl("near", 3))):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        outer.writestr("deep/inner.tar", inner.getvalue())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Workers", Serial)
        patch.setattr(work_items, "LINES_BYTES", 700)
        patch.setattr(origin_file, "ROW_GROUP", 16)
        preprocess([str(folder)], output_prefix=str(root / "p"), tokenizer_path=str(tokenizer), skip_bad=True)
    return folder, str(root / "p")


def read_member(path: Path, member: str) -> bytes:
    """Return the bytes that an origin counts in, by the plainest way to them."""
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix != ".zip":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        if "inner.tar/" not in member:
            return archive.read(member)
        with tarfile.open(fileobj=io.BytesIO(archive.read("deep/inner.tar"))) as tar:
            return tar.extractfile(member.partition("inner.tar/")[2]).read()


def test_every_origin_leads_to_its_text(made: tuple[Path, str]) -> None:
    folder, prefix = made
    (shard,), tokenizer = open_shards([prefix]), TextTokenizer(folder.parent / "tokenizer.json")
    assert shard.num_documents == 1 + 40 + 1 + 7 + 9 + 1 + 1 + 3
    origins = shard.origins(0, shard.num_documents)
    rows = [
        {name: column[number] for name, column in {name: origins.column(name) for name in COLUMNS}.items()}
        for number in range(origins.count)
    ]
    seen = set()
    for number, row in enumerate(rows):
        path = Path(row["file"])
        text = tokenizer.decode(shard.tokens(number).tolist()).removesuffix("<|endoftext|>")
        seen.add((path.name, row["member"]))
        if path.suffix == ".parquet":
            assert row["stop"] is None
            record = pyarrow.parquet.read_table(path).to_pylist()[row["start"]]
            assert (text, row["url"]) == (record["text"], record["url"] or "")
            assert row["date"] == str(record["date"])
            continue
        data = read_member(path, row["member"])
        if row["start"] is None:
            assert text == data.decode()
            continue
        record = json.loads(data[row["start"] : row["stop"]])
        (inner,) = record.get("segments", [record])
        assert text == inner["text"]
        assert row["licence"] == record.get("license", record.get("licence", ""))
        assert row["date"] == str(record.get("timestamp", "")) and row["url"] == record.get("url", "")
    assert seen == {
        *(("alone.txt", ""), ("lines.jsonl", ""), ("packed.jsonl.gz", ""), ("rows.parquet", "")),
        *(("all.zip", f"deep/{name}") for name in ("a.txt", "inner.tar/x/b.txt", "inner.tar/x/c.jsonl")),
    }
    for start, stop in ((15, 17), (0, 16), (16, 48), (61, 63), (30, 30)):  # groups have 16
        part = shard.origins(start, stop)
        assert [part.column(name) for name in COLUMNS] == [origins.column(name)[start:stop] for name in COLUMNS]


def test_the_manifest_counts_files_and_licences(made: tuple[Path, str]) -> None:
    manifest = json.loads(Path(f"{made[1]}.json").read_text())
    assert manifest["origins"]["files"] == 5
    counts = manifest["origins"]["documents_by_licence"]
    assert sum(counts.values()) == manifest["documents"]
    assert counts.keys() == {"not given", "CC0", "MIT"}


def test_licences_are_named_up_to_a_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin_file, "COUNTED_LICENCES", 150)
    names = [f"licence {number}" for number in range(200)] + ["licence 7"] * 5 + [""] * 3
    said = origin_file.write_columns([Origins(208, "f", licence=names)], io.BytesIO())["documents_by_licence"]
    # The last 50 names, and what is not given, come when 150 are counted: they are among the others.
    assert next(iter(said.items())) == ("licence 7", 6)
    assert len(said) == 101 and sum(said.values()) == 208 and said["other"] == 208 - 6 - 99
    twice = origin_file.summed([{"files": 1, "documents_by_licence": said}] * 2)
    assert (twice["files"], sum(twice["documents_by_licence"].values())) == (2, 416)


def test_plain_lines_cost_little(tmp_path: Path) -> None:
    rng, count = np.random.default_rng(0), 100_000
    start = np.cumsum(rng.lognormal(7, 1, count).astype(np.int64) + 20)
    stop = start + rng.integers(10, 20, count)
    pieces = [slice(at, at + 1000) for at in range(0, count, 1000)]
    batches = [Origins(1000, "corpus/part-0.jsonl", start[piece], stop[piece]) for piece in pieces]
    origin_file.write_columns(batches, sink := io.BytesIO())
    assert len(sink.getvalue()) < 12 * count
    table = pyarrow.parquet.read_table(sink)
    np.testing.assert_array_equal(table["start"], start)
    np.testing.assert_array_equal(table["stop"], stop)
    file = pyarrow.parquet.ParquetFile(sink)
    assert [file.metadata.row_group(group).num_rows for group in range(2)] == [65_536, 34_464]


def test_the_columns_of_a_file_are_those_of_its_documents(made: tuple[Path, str]) -> None:
    path = Path(f"{made[1]}.origin.parquet")
    table = pyarrow.parquet.read_table(path)
    assert table.column_names == [*COLUMNS]
    assert table.num_rows == ShardReader(made[1]).num_documents


def plain(prefix: Path, origins: Origins | None, *, count: int = 3) -> ShardReader:
    documents = [EncodedDocument(np.asarray([20 + number, 7]), Source.TEXT) for number in range(count)]
    batch = EncodedBatch.of(documents)
    with ShardWriter(prefix, tokenizer=INFO) as writer:
        writer.add(documents[0])
        writer.add_batch(EncodedBatch(batch.tokens, batch.lengths, batch.sources, origins=origins))
    return ShardReader(prefix)


def test_what_is_not_known_is_not_written(tmp_path: Path) -> None:
    reader = plain(tmp_path / "p", Origins(3, "a", np.arange(3), np.arange(3) + 1))
    assert reader.origins(0, 4).column("file") == ["", "a", "a", "a"]
    assert reader.origins(0, 4).column("start") == [None, 0, 1, 2]
    reader = plain(tmp_path / "p", None)
    assert reader.origins(0, 4) is None and "origins" not in reader.manifest
    assert not list(tmp_path.glob("p.origin*")), "that of the shards before is gone"
    with pytest.raises(DataError, match="2 origins came for 3 documents"):
        plain(tmp_path / "p", Origins(2, "a"))


def test_a_name_that_is_no_utf8_can_be_kept(tmp_path: Path) -> None:
    reader = plain(tmp_path / "p", Origins(3, os.fsdecode(b"caf\xe9.txt"), member=["a", "\udc80", "c"]))
    assert reader.origins(1, 4).column("file") == ["caf\\udce9.txt"] * 3
    assert reader.origins(1, 4).column("member") == ["a", "\\udc80", "c"]


LOSSES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "damaged": lambda path: path.write_bytes(path.read_bytes()[:20] + b"\xff\xfe" + path.read_bytes()[22:]),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_origin_file_stops_nobody_but_who_asks_for_it(loss: str, tmp_path: Path) -> None:
    prefix = str(write_shards(tmp_path))
    (whole,) = open_shards([prefix])
    numbers = list(range(whole.num_documents))
    with ShardWriter(tmp_path / "p", tokenizer=whole.tokenizer) as writer:
        batch = EncodedBatch.of([whole.document(number) for number in numbers])
        origins = Origins(len(numbers), "f", start=np.asarray(numbers))
        writer.add_batch(EncodedBatch(batch.tokens, batch.lengths, batch.sources, batch.media, origins))
    before = fingerprints(str(tmp_path / "p"))
    ShardReader(tmp_path / "p").verify()
    LOSSES[loss](tmp_path / "p.origin.parquet")
    assert [digest for _, digest in fingerprints(str(tmp_path / "p"))] == [digest for _, digest in before]
    reader = ShardReader(tmp_path / "p")
    for suffix, block, _ in reader.blocks:
        reader.check_block(suffix, block)
    np.testing.assert_array_equal(reader.tokens(3), whole.tokens(3))
    with pytest.raises(DataError, match=r"p\.origin\.parquet"):
        reader.origins(0, 2)
    with pytest.raises(DataError, match=r"p\.origin\.parquet"):
        ShardReader(tmp_path / "p").verify()


def test_fingerprints_are_those_of_shards_without_origins(tmp_path: Path) -> None:
    plain(tmp_path / "a", None)
    plain(tmp_path / "b", Origins(3, "f"))
    assert fingerprints(str(tmp_path / "a"))[0][1] == fingerprints(str(tmp_path / "b"))[0][1]


def test_deduplicated_and_merged_shards_keep_it(made: tuple[Path, str], tmp_path: Path, monkeypatch) -> None:
    _, prefix = made
    plain(tmp_path / "old", None)
    (shard,) = open_shards([prefix])
    with ShardWriter(tmp_path / "twice", tokenizer=shard.tokenizer) as writer:
        for number in (5, 3, 5):
            batch = EncodedBatch.of([shard.document(number)])
            origins = Origins(1, f"again/{number}")
            writer.add_batch(EncodedBatch(batch.tokens, batch.lengths, batch.sources, origins=origins))
    monkeypatch.setattr("megatron_mm.ingest.deduplicate.BLOCK_DOCUMENTS", 7)
    deduplicate([prefix, str(tmp_path / "twice")], output_prefix=str(tmp_path / "unique"))
    copy = ShardReader(tmp_path / "unique")
    assert copy.num_documents == shard.num_documents, "only those of the second are left out"
    ours, theirs = (one.origins(0, one.num_documents) for one in (copy, shard))
    assert [ours.column(name) for name in COLUMNS] == [theirs.column(name) for name in COLUMNS]
    assert copy.manifest["origins"] == shard.manifest["origins"]
    merged = merge(tmp_path / "all", [str(tmp_path / "twice"), prefix])
    assert merged["origins"]["files"] == 3 + 5
    rows = list(list_documents(str(tmp_path / "all"), start=2, stop=5))
    found = [(row["document"], Path(row["file"]).name, row["member"]) for row in rows]
    assert found == [("2", "5", ""), ("3", "all.zip", "deep/a.txt"), ("4", "all.zip", "deep/inner.tar/x/b.txt")]


def test_documents_are_listed_with_their_origins(made: tuple[Path, str]) -> None:
    rows = list(list_documents(made[1]))
    lines = [row for row in rows if row["file"].endswith("lines.jsonl")]
    assert lines[0]["place"].startswith("bytes 0 to ") and lines[0]["text"] == "red house 0"
    assert [row["place"] for row in rows if row["file"].endswith(".parquet")][:3] == ["row 0", "row 1", "row 2"]
    table = render_table(lines[:4]).splitlines()
    assert len(table) == 5 and "media" not in table[0], "nothing is shown of a column that is empty"
    assert table[1].split("  ")[-1].strip() == "red house 0" and "https://a.b/0" in table[1]
    shown = render_one(lines[3])
    assert "licence   CC0" in shown and "url       https://a.b/3" in shown and "member" not in shown
    with pytest.raises(ConfigError, match="--document 99 is none of the 63"):
        next(list_documents(made[1], start=99, stop=100))


def test_media_are_counted_in_a_listing(shards: Path) -> None:
    rows = list(list_documents(str(shards)))
    assert {"1 image", "1 audio", "2 image, 1 audio"} <= {row["media"] for row in rows}
    assert all(row["file"] == "" and row["text"] for row in rows)


def test_shards_are_read_without_a_library_for_columns() -> None:
    code = "import sys, megatron_mm.shards; assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_card_names_files_and_licences(made: tuple[Path, str], tmp_path: Path) -> None:
    plain(tmp_path / "old|er", None)
    datasets = f"{{'{made[1]},{tmp_path / 'gone'}': 0.5, '{tmp_path / 'old|er'}': 0.5}}"
    config = configs.load("tiny", [f"data.train={datasets}", "data.validation=[]", f"run_dir={tmp_path}"])
    card = model_card(config, kind="text", step=3, figures={})
    section = card.partition("## The data\n")[2].partition("## The run")[0]
    shard = ShardReader(made[1])
    assert f"| {made[1]} | 5 | 63 | {shard.num_tokens:,} |" in section
    assert f"| {tmp_path}/old\\|er | not recorded | 4 | 8 |" in section
    assert f"| CC0 | {shard.manifest['origins']['documents_by_licence']['CC0']} |" in section
    assert f"Nothing is said of {tmp_path / 'gone'}: the shards were not there" in section
