"""Pairs of Megatron-LM become shards without a copy, and those that cannot be trained on are refused by name."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from small import VOCAB_SIZE, save_tokenizer, sentence, small_config

from megatron_mm.data import token_row
from megatron_mm.data.loader import Loader
from megatron_mm.data.native import TOKEN_BYTES
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.ingest import adopt as module
from megatron_mm.ingest.adopt import adopt
from megatron_mm.shards import EncodedDocument, ShardReader, ShardWriter, format, merge, open_shards, writer
from megatron_mm.source import Source
from megatron_mm.tokenizer import TextTokenizer

TOOL = Path(__file__).parents[2] / "tools" / "shards.py"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


def texts(tokenizer: TextTokenizer, count: int = 30) -> list[list[int]]:
    """Ids of documents of many lengths, each with its end-of-text."""
    rng = np.random.default_rng(0)
    end = tokenizer.special_ids["end_of_text"]
    return [[*tokenizer.encode(sentence(rng, int(words))), end] for words in rng.integers(2, 90, count)]


def build(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.int32, *, sentences: int = 1) -> str:
    """Write a pair as Megatron-LM's tools do, each document as so many sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        cuts = np.array_split(np.arange(len(document)), sentences)
        builder.add_document(torch.tensor(document), [len(cut) for cut in cuts])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def of_small_ids(tokenizer: TextTokenizer, dtype: type) -> list[list[int]]:
    """Documents whose ids a type can hold; of one byte it holds no end-of-text."""
    documents = texts(tokenizer)
    return [[number % 120 for number in own] for own in documents] if dtype in (np.uint8, np.int8) else documents


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_a_pair_becomes_the_shards_of_its_documents(dtype, tokenizer, tmp_path: Path, monkeypatch) -> None:
    for owner in (module, writer):
        monkeypatch.setattr(owner, "BLOCK_BYTES", 1024)
    monkeypatch.setattr("megatron_mm.shards.reader.BLOCK_BYTES", 1024)
    monkeypatch.setattr(module, "INDEX_ELEMENTS", 7)
    monkeypatch.setattr(module, "PAGE_BYTES", 512)
    monkeypatch.setattr("megatron_mm.shards.checksums.PAGE_BYTES", 512)
    documents = of_small_ids(tokenizer, dtype)
    prefix = build(tmp_path / "p", documents, dtype)
    before = [Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx")]
    seen: list[int] = []
    is_ended = dtype not in (np.uint8, np.int8)
    counts = adopt(prefix, tokenizer, end_of_text=is_ended, progress=seen.append)
    assert sum(seen) == sum(map(len, before)), "every byte is read once"
    assert before == [Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx")]
    assert (counts.documents, counts.tokens) == (len(documents), sum(map(len, documents)))
    reader = ShardReader(prefix)
    reader.verify()
    assert reader.tokenizer == tokenizer.info and reader.origins(0, 1) is None
    for number, document in enumerate(documents):
        assert reader.tokens(number).tolist() == document
        assert reader.source(number) == Source.TEXT
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"p.{suffix}" for suffix in ("bin", "crc", "idx", "json", "media.bin", "media.idx", "tokenizer")
    ]


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_training_sees_the_samples_of_shards_of_the_same_documents(dtype, packing, tokenizer, tmp_path: Path) -> None:
    documents = texts(tokenizer)
    prefix = build(tmp_path / "pair", documents, dtype)
    adopt(prefix, tokenizer)
    with ShardWriter(tmp_path / "own", tokenizer=tokenizer.info, tokenizer_content=tokenizer.content) as own:
        for document in documents:
            own.add(EncodedDocument(np.asarray(document), Source.TEXT))
    if dtype == np.uint16:
        for suffix in (".bin", ".idx", ".crc", ".media.bin", ".media.idx", ".tokenizer"):
            assert Path(prefix + suffix).read_bytes() == Path(f"{tmp_path}/own{suffix}").read_bytes(), suffix
    ranks = {f"{axis}_rank": 0 for axis in ("tp", "cp", "dp")} | {f"{axis}_size": 1 for axis in ("tp", "cp", "dp")}
    mesh = SimpleNamespace(**ranks, is_first_chunk=lambda chunk: True, is_rank_0=True)
    configs = [small_config(path, tmp_path, f"data.packing={packing}") for path in (prefix, tmp_path / "own")]
    ours, theirs = (Loader(config.data.train, config=config, mesh=mesh).step(1) for config in configs)
    for one, other in zip(ours, theirs, strict=True):
        for name in ("tokens", "labels", "loss_mask", "origins", "positions"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_ids_that_csrc_does_not_lay_are_laid_by_the_reference(tokenizer, tmp_path: Path) -> None:
    adopt(build(tmp_path / "p", of_small_ids(tokenizer, np.uint8), np.uint8), tokenizer, end_of_text=False)
    shard = ShardReader(tmp_path / "p")
    assert shard.token_bytes not in TOKEN_BYTES
    row = token_row.TokenRow(20, pad=0)
    row.add_pieces(
        shard, np.asarray([(0, 3, 0, 2)], [(name, "<i8") for name in ("shard", "document", "start", "length")])
    )
    assert row.labels[:2].tolist() == shard.tokens(3)[1:3].tolist()


def with_modes(prefix: Path, tokenizer: TextTokenizer) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32, multimodal=True)
    for document in texts(tokenizer, 3):
        builder.add_document(torch.tensor(document), [len(document)], [0])
    builder.finalize(f"{prefix}.idx")


def cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


def poke(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def changed(change: Callable[[Path], object]) -> Callable[[Path, TextTokenizer], None]:
    """A pair of good documents, and then something else."""

    def make(prefix: Path, tokenizer: TextTokenizer) -> None:
        build(prefix, texts(tokenizer))
        change(prefix)

    return make


def of(*more: Sequence[int], dtype: type = np.int32, **how) -> Callable[[Path, TextTokenizer], None]:
    """A pair of good documents, and more."""

    def make(prefix: Path, tokenizer: TextTokenizer) -> None:
        ids = [[tokenizer.special_ids[one] if isinstance(one, str) else one for one in document] for document in more]
        build(prefix, [*texts(tokenizer), *ids], dtype, **how)

    return make


BAD = {
    "sentences": (of(sentences=2), r"60 sequences in 30 documents, as preprocess_data.py --split-sentences"),
    "modes": (with_modes, r"has a mode for each sequence, as preprocess_mmdata.py"),
    "floats": (of(dtype=np.float32), r"has ids of type float32"),
    "no text": (
        of([5, VOCAB_SIZE, 5, "end_of_text"]),
        rf"the id {VOCAB_SIZE}, and the tokenizer has {VOCAB_SIZE}",
    ),
    "negative": (of([5, -1, "end_of_text"]), r"holds the id -1"),
    "a placeholder": (of([5, "image", "end_of_text"]), r"which is <\|image\|> in this tokenizer: it stands for media"),
    "no end": (of([5, 6], [7]), r"2 of 32 documents \(6\.2%\) do not end in end-of-text, .*use --no-end-of-text"),
    "no documents": (lambda prefix, tokenizer: build(prefix, []), r"holds no documents"),
    "cut tokens": (changed(lambda prefix: cut(Path(f"{prefix}.bin"), 4)), r"\.bin has \d+ bytes, and .* tells of"),
    "more tokens": (changed(lambda prefix: poke(Path(f"{prefix}.bin"), 10**5, b"x")), r"\.bin has 100001 bytes"),
    "cut index": (changed(lambda prefix: cut(Path(f"{prefix}.idx"), 8)), r"\.idx has \d+ bytes, and its header tells"),
    "cut header": (changed(lambda prefix: os.truncate(f"{prefix}.idx", 20)), r"is not an index of megatron-core"),
    "another file": (changed(lambda prefix: poke(Path(f"{prefix}.idx"), 0, b"nothing")), r"is not an index"),
    "a version": (changed(lambda prefix: poke(Path(f"{prefix}.idx"), 9, b"\2")), r"has version 2"),
    "an empty one": (changed(lambda prefix: poke(Path(f"{prefix}.idx"), 34, bytes(4))), r"document 0 has 0 tokens"),
    "a gap": (
        changed(lambda prefix: poke(Path(f"{prefix}.idx"), 34 + 4 * 30 + 8 * 2, b"\1")),
        r"document 2 does not begin",
    ),
}
"""Pairs that are refused, and what is said."""


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_trained_on_is_refused(name: str, tokenizer, tmp_path: Path) -> None:
    make, words = BAD[name]
    make(tmp_path / "p", tokenizer)
    with pytest.raises(DataError, match=words):
        adopt(str(tmp_path / "p"), tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.bin", "p.idx"], "nothing is left"


def test_another_token_that_ends_texts_is_named(tokenizer, tmp_path: Path) -> None:
    end = tokenizer.encode("x")[0]
    prefix = build(tmp_path / "p", [[*document[:-1], end] for document in texts(tokenizer)])
    with pytest.raises(DataError, match=rf"100\.0%.*30 end in 'x' \(id {end}\)"):
        adopt(prefix, tokenizer)
    adopt(prefix, tokenizer, end_of_text=False)
    assert ShardReader(prefix).manifest["adopted"] == {"end_of_text": False}


def test_shards_are_no_pair(tokenizer, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.json exists: these are shards already"):
        adopt(str(shards), tokenizer)
    for suffix in (".bin", ".idx", ".media.bin"):
        os.link(f"{shards}{suffix}", tmp_path / f"p{suffix}")
    with pytest.raises(ConfigError, match="holds media: these are shards of this package that lost their manifest"):
        adopt(str(tmp_path / "p"), tokenizer)
    with pytest.raises(ConfigError, match=r"none\.bin does not exist"):
        adopt(str(tmp_path / "none"), tokenizer)


def test_the_tool_adopts_and_shards_of_both_kinds_are_merged(tokenizer, shards: Path, tmp_path: Path) -> None:
    prefix = build(tmp_path / "old_text_document", texts(tokenizer), np.uint16)
    with pytest.raises(DataError, match=rf"shards.py adopt {prefix} --tokenizer T`, which copies nothing"):
        open_shards([prefix])
    command = [sys.executable, str(TOOL), "adopt", prefix, "--tokenizer", str(tokenizer.path)]
    tool = subprocess.run(command, capture_output=True, text=True)
    assert tool.returncode == 0, tool.stderr
    assert "30 documents" in tool.stdout and "%|" in tool.stderr
    assert tokenizer.decode(texts(tokenizer)[1][:6]) in tool.stdout, "a wrong tokenizer would be seen"
    manifest = merge(tmp_path / "both", [prefix, str(shards)])
    assert manifest["documents"] == 30 + json.loads(Path(f"{shards}.json").read_text())["documents"]


def test_every_type_of_ids_has_its_code() -> None:
    for code, dtype in format.TOKEN_DTYPES.items():
        assert DType.dtype_from_code(code) == dtype
    assert {one.value for one in DType} == {*format.TOKEN_DTYPES, *module.OTHER_DTYPES}
