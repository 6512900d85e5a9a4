"""Shards: what is written is read back, by megatron-core too, and what is damaged is never read in silence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small import documents, save_tokenizer, seal

from megatron_mm.data.packing import plan_packing
from megatron_mm.errors import DataError
from megatron_mm.ingest.encode import encode_document
from megatron_mm.modalities import BY_KIND
from megatron_mm.shards import (
    EncodedDocument,
    MediaItem,
    ShardReader,
    ShardWriter,
    TokenizerInfo,
    merge,
    open_shards,
    stored_tokenizer,
)
from megatron_mm.source import Source
from megatron_mm.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, list[EncodedDocument]]:
    tokenizer = TextTokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))
    return tokenizer, [encode_document(document, tokenizer) for document in documents()]


def write(prefix: Path, encoded: tuple[TextTokenizer, list[EncodedDocument]]) -> Path:
    tokenizer, made = encoded
    with ShardWriter(prefix, tokenizer=tokenizer.info) as writer:
        for document in made:
            writer.add(document)
    return prefix


def test_what_is_written_is_read_back(tmp_path: Path, encoded) -> None:
    reader = ShardReader(write(tmp_path / "p", encoded))
    tokenizer, made = encoded
    assert reader.tokenizer == tokenizer.info
    assert reader.num_documents == len(made)
    for number, document in enumerate(made):
        np.testing.assert_array_equal(reader.tokens(number), document.tokens)
        np.testing.assert_array_equal(reader.tokens(number, 1, 3), document.tokens[1:3])
        assert reader.source(number) == document.source
        items = reader.media(number)
        assert len(items) == len(document.media)
        assert bool(reader.has_media()[number]) == bool(document.media)
        for found, item in zip(items, document.media):
            assert reader.media_bytes(found) == item.data
            assert (BY_KIND[found["kind"]].name, found["token_offset"], found["num_tokens"]) == (
                item.modality,
                item.token_offset,
                item.num_tokens,
            )
    reader.verify()


def test_the_manifest_counts(tmp_path: Path, encoded) -> None:
    write(tmp_path / "p", encoded)
    manifest = json.loads((tmp_path / "p.json").read_text())
    made = encoded[1]
    assert manifest["documents"] == len(made)
    assert manifest["tokens"] == sum(len(document.tokens) for document in made)
    assert manifest["by_source"]["audio"] == sum(document.source == Source.AUDIO for document in made)
    assert manifest["media"]["image"] == sum(item.modality == "image" for document in made for item in document.media)


@pytest.mark.parametrize("vocab_size", [320, 51_200, 200_000])
@pytest.mark.parametrize("mmap", [True, False])
def test_megatron_core_reads_the_tokens(tmp_path: Path, vocab_size: int, mmap: bool) -> None:
    info = TokenizerInfo("0" * 64, vocab_size, {})
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, vocab_size, length) for length in (5, 1, 300, 17)]
    with ShardWriter(tmp_path / "p", tokenizer=info) as writer:
        for tokens in texts:
            writer.add(EncodedDocument(tokens, Source.TEXT))
    dataset = IndexedDataset(str(tmp_path / "p"), mmap=mmap)
    assert len(dataset) == len(texts)
    np.testing.assert_array_equal(dataset.document_indices, np.arange(len(texts) + 1))
    np.testing.assert_array_equal(dataset.sequence_lengths, [len(tokens) for tokens in texts])
    for number, tokens in enumerate(texts):
        np.testing.assert_array_equal(dataset[number], tokens)
        np.testing.assert_array_equal(dataset.get(number, offset=1), tokens[1:])


def test_no_documents_are_valid_shards(tmp_path: Path, encoded) -> None:
    reader = ShardReader(write(tmp_path / "p", (encoded[0], [])))
    assert reader.num_documents == 0
    reader.verify()


DAMAGE = {
    "the manifest is missing": lambda p: Path(f"{p}.json").unlink(),
    "the manifest is cut": lambda p: Path(f"{p}.json").write_text(Path(f"{p}.json").read_text()[:50]),
    "the manifest is of another version": lambda p: edit(p, lambda manifest: manifest.update(version=9)),
    "the manifest says another modality's setting": lambda p: edit(
        p, lambda manifest: manifest["modalities"]["image"].update(tiles=3)
    ),
    "the manifest has lost its hash": lambda p: edit(p, lambda manifest: manifest.pop("sha256")),
    "checksums are missing": lambda p: Path(f"{p}.crc").unlink(),
    "tokens are cut": lambda p: os.truncate(f"{p}.bin", os.path.getsize(f"{p}.bin") - 2),
    "tokens are appended": lambda p: Path(f"{p}.bin").write_bytes(Path(f"{p}.bin").read_bytes() + b"xx"),
    "media are cut": lambda p: os.truncate(f"{p}.media.bin", 10),
    "media are missing": lambda p: Path(f"{p}.media.bin").unlink(),
    "the index is of fewer documents": lambda p: edit(p, lambda manifest: manifest.update(documents=3)),
    "the index has no header": lambda p: poke(f"{p}.idx", 0, b"\0"),
    "the index says another type": lambda p: poke(f"{p}.idx", 17, b"\4"),
    "a length is wrong": lambda p: poke(f"{p}.idx", 34, b"\x07\0\0\0"),
    "a length is negative": lambda p: poke(f"{p}.idx", 34, b"\xff\xff\xff\xff"),
    "a boundary is wrong": lambda p: poke(f"{p}.idx", os.path.getsize(f"{p}.idx") - 16, b"\x01"),
    "a pointer is swapped": lambda p: poke(f"{p}.idx", os.path.getsize(f"{p}.idx") - 8 * 83 - 8 * 20, b"\x02"),
    "the media index is of other shards": lambda p: poke(f"{p}.media.idx", 16, b"\x01"),
}
"""Damage that opening shards must find."""

SILENT_DAMAGE = {
    "a token is flipped": lambda p: poke(f"{p}.bin", 100, b"\xff"),
    "a page of tokens is zero": lambda p: poke(f"{p}.bin", 0, bytes(1024)),
    "a pixel is flipped": lambda p: poke(f"{p}.media.bin", 300, b"\xff\xfe"),
}
"""Damage that leaves sizes and headers as they are: `verify` must find it."""


def edit(prefix: Path, change) -> None:
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    change(manifest)
    Path(f"{prefix}.json").write_text(json.dumps(manifest))


def poke(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        before = file.read(len(data))
        file.seek(offset)
        file.write(data if data != before else bytes(255 - byte for byte in before))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_opening_finds(damage, tmp_path: Path, encoded) -> None:
    prefix = write(tmp_path / "p", encoded)
    damage(prefix)
    with pytest.raises(DataError) as failure:
        ShardReader(prefix)
    assert str(prefix) in str(failure.value)


@pytest.mark.parametrize("damage", SILENT_DAMAGE.values(), ids=SILENT_DAMAGE.keys())
def test_verify_finds(damage, tmp_path: Path, encoded) -> None:
    prefix = write(tmp_path / "p", encoded)
    damage(prefix)
    with pytest.raises(DataError, match="differ from what was written"):
        ShardReader(prefix).verify()


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_read_is_what_was_written(version: int, tmp_path: Path, encoded) -> None:
    prefix = write(tmp_path / "p", encoded)
    seal(prefix, version=version)
    poke(f"{prefix}.bin", 9_000, b"\xff")
    reader = ShardReader(prefix)
    starts = np.cumsum([0, *reader.lengths()]) * 2
    found = []
    for number in range(reader.num_documents):
        try:
            np.testing.assert_array_equal(reader.tokens(number), encoded[1][number].tokens)
        except DataError as error:
            assert "differ from what was written" in str(error)
            found.append(number)
    page = range(8192, 12288) if version == 2 else range(starts[-1])
    assert found == [n for n in range(len(starts) - 1) if starts[n] < page.stop and starts[n + 1] > page.start]


def test_damaged_checksums_are_told_from_damaged_tokens(tmp_path: Path, encoded) -> None:
    prefix = write(tmp_path / "p", encoded)
    poke(f"{prefix}.crc", 1, b"\xff")
    reader = ShardReader(prefix)
    with pytest.raises(DataError, match=r"p\.crc is damaged: what it says of .*p\.bin from byte 0 on"):
        reader.tokens(0)
    with pytest.raises(DataError, match=r"p\.crc: bytes 0 to \d+ differ"):
        reader.verify()


def test_verify_covers_the_tokenizer(tmp_path: Path, encoded) -> None:
    tokenizer, made = encoded
    with ShardWriter(tmp_path / "p", tokenizer=tokenizer.info, tokenizer_content=tokenizer.content) as writer:
        writer.add(made[0])
    ShardReader(tmp_path / "p").verify()
    poke(str(tmp_path / "p.tokenizer"), 100, b"#")
    with pytest.raises(DataError, match="p.tokenizer is not the tokenizer that"):
        ShardReader(tmp_path / "p").verify()


def test_damaged_media_are_not_read(tmp_path: Path, encoded) -> None:
    prefix = write(tmp_path / "p", encoded)
    poke(f"{prefix}.media.bin", 300, b"\xff\xfe")
    reader = ShardReader(prefix)
    with pytest.raises(DataError, match="does not match its checksum"):
        [reader.media_bytes(item) for number in range(reader.num_documents) for item in reader.media(number)]


def test_another_tokenizer_is_refused(tmp_path: Path, encoded) -> None:
    first = write(tmp_path / "a", encoded)
    other = TokenizerInfo("1" * 64, encoded[0].info.vocab_size, encoded[0].info.special_ids)
    with ShardWriter(tmp_path / "b", tokenizer=other) as writer:
        writer.add(EncodedDocument(np.asarray([1, 2]), Source.TEXT))
    with pytest.raises(DataError, match="different tokenizers"):
        open_shards([str(first), str(tmp_path / "b")])


def test_what_cannot_be_a_document_is_refused(tmp_path: Path, encoded) -> None:
    tokenizer = encoded[0]
    image = tokenizer.special_ids["image"]
    beside = EncodedDocument(np.asarray([1, *[image] * 196]), Source.IMAGE, [MediaItem("image", b"x", 0, 196)])
    outside = EncodedDocument(np.asarray([tokenizer.info.vocab_size]), Source.TEXT)
    small = EncodedDocument(np.asarray([image] * 9), Source.IMAGE, [MediaItem("image", b"x", 0, 9)])
    silent = EncodedDocument(np.asarray([1]), Source.AUDIO, [MediaItem("audio", b"x", 0, 0)])
    run = MediaItem("image", b"x", 0, 196)
    twice = EncodedDocument(np.asarray([image] * 196), Source.IMAGE, [run, run])
    for document, message in (
        (beside, "not 196 placeholders"),
        (outside, "outside the vocabulary"),
        (small, r"document 0 has an item of 9 tokens \(image\) at 0, which cannot be"),
        (silent, r"document 0 has an item of 0 tokens \(audio\) at 0, which cannot be"),
        (twice, r"document 0 has an item of 196 tokens \(image\) at 0, behind one that comes later"),
        (EncodedDocument(np.asarray([1]), 17), "document 0 has source 17, which is none"),
    ):
        with pytest.raises(DataError, match=message), ShardWriter(tmp_path / "p", tokenizer=tokenizer.info) as writer:
            writer.add(document)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_nothing_and_what_was_there(tmp_path: Path, encoded) -> None:
    prefix = write(tmp_path / "p", encoded)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError), ShardWriter(prefix, tokenizer=encoded[0].info) as writer:
        writer.add(encoded[1][0])
        raise ZeroDivisionError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_writers_of_one_prefix_are_kept_apart(tmp_path: Path, encoded) -> None:
    info = encoded[0].info
    with ShardWriter(tmp_path / "p", tokenizer=info), pytest.raises(DataError, match="another process is writing"):
        ShardWriter(tmp_path / "p", tokenizer=info).__enter__()


WRITE_FOR_EVER = """
import sys, itertools
import numpy as np
from megatron_mm.shards import *
from megatron_mm.modalities import BY_KIND
from megatron_mm.source import Source
print("ready", flush=True)
for run in itertools.count():
    with ShardWriter(sys.argv[1], tokenizer=TokenizerInfo("0" * 64, 1000, {})) as writer:
        for number in range(50):
            writer.add(EncodedDocument(np.full(run % 7 + 2, run % 900), Source.TEXT))
"""


def test_a_writer_killed_at_any_moment_leaves_whole_shards_or_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = 0
    for attempt in range(12):
        prefix = tmp_path / str(attempt) / "p"
        writer = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(prefix)], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 30
        while attempt % 2 and not Path(f"{prefix}.json").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.03))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        try:
            reader = ShardReader(prefix)
        except DataError as error:
            assert "is missing" in str(error)
            # megatron-core's reader asks for no manifest: it must find no pair either, or a matching one.
            if Path(f"{prefix}.idx").exists():
                dataset = IndexedDataset(str(prefix))
                assert {int(document[0]) for document in dataset} == {int(dataset[0][0])}
                assert Path(f"{prefix}.bin").stat().st_size == 2 * int(dataset.sequence_lengths.sum())
            continue
        reader.verify()
        whole += 1
        assert len({int(reader.tokens(number)[0]) for number in range(50)}) == 1, "documents of two runs are mixed"
    assert whole > 0


def test_damage_that_opening_passes_over_is_found_when_it_is_read(tmp_path: Path, encoded, monkeypatch) -> None:
    prefix = write(tmp_path / "p", encoded)
    poke(f"{prefix}.idx", 34 + 4 * 40, b"\x07\0\0\0")
    seal(prefix)
    monkeypatch.setattr("megatron_mm.shards.reader.CHECKED_DOCUMENTS", 20)
    reader = ShardReader(prefix)
    reader.tokens(39), reader.tokens(41)
    with pytest.raises(DataError, match="disagrees with itself about document 40"):
        reader.tokens(40)
    with pytest.raises(DataError, match="its lengths add up to"):
        plan_packing([reader], seq_len=512)


def test_an_empty_document_is_refused(tmp_path: Path, encoded) -> None:
    nothing = EncodedDocument(np.zeros(0, np.int64), Source.TEXT)
    with (
        pytest.raises(DataError, match="document 1 has no tokens"),
        ShardWriter(tmp_path / "p", tokenizer=encoded[0].info) as writer,
    ):
        writer.add(encoded[1][0])
        writer.add(nothing)


def test_merged_shards_are_their_parts(tmp_path: Path, encoded) -> None:
    parts = [str(write(tmp_path / name / "p", encoded)) for name in ("a", "b")]
    manifest = merge(tmp_path / "all", parts)
    assert manifest["documents"] == 2 * len(encoded[1])
    (tmp_path / "moved").mkdir()
    for name in ("a", "b", "all.json"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    shards = open_shards([str(tmp_path / "moved" / "all")])
    assert [shard.num_documents for shard in shards] == [len(encoded[1])] * 2
    with pytest.raises(DataError, match="lists parts: open them with"):
        ShardReader(tmp_path / "moved" / "all")
    with pytest.raises(DataError, match="is missing"):
        merge(tmp_path / "all", [str(tmp_path / "none")])


def test_the_tokenizer_is_stored_with_the_shards_and_must_be_theirs(encoded, tmp_path: Path) -> None:
    tokenizer, documents = encoded[0], encoded[1]
    parts = [tmp_path / "a", tmp_path / "b"]
    for prefix in parts:
        with ShardWriter(prefix, tokenizer=tokenizer.info, tokenizer_content=tokenizer.content) as writer:
            writer.add(documents[0])
    merge(tmp_path / "both", [str(part) for part in parts])
    assert stored_tokenizer(str(tmp_path / "a")) == stored_tokenizer(str(tmp_path / "both")) == tokenizer.content
    (tmp_path / "a.tokenizer").write_bytes(tokenizer.content + b" ")
    with pytest.raises(DataError, match="not the tokenizer that"):
        stored_tokenizer(str(tmp_path / "a"))
    with ShardWriter(parts[0], tokenizer=tokenizer.info) as writer:
        writer.add(documents[0])
    assert stored_tokenizer(str(tmp_path / "a")) is None
