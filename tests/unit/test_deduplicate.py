"""Deduplication: the first of equal and of similar documents stays, any other is listed with what it repeats."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small import VOCAB_SIZE

from megatron_mm.ingest import deduplicate as module
from megatron_mm.ingest.deduplicate import deduplicate
from megatron_mm.shards import EncodedDocument, MediaItem, ShardReader, ShardWriter, TokenizerInfo
from megatron_mm.source import Source

INFO = TokenizerInfo("0" * 64, VOCAB_SIZE, {"image": 10, "audio": 11})
ROOT = Path(__file__).parents[2]


def text(seed: int, length: int = 400, *, changed: int = 0) -> EncodedDocument:
    """Random tokens, of which the last `changed` are others than without it."""
    tokens = np.random.default_rng(seed).integers(20, VOCAB_SIZE, length)
    tokens[length - changed :] = np.random.default_rng(seed + 1000).integers(20, VOCAB_SIZE, changed)
    return EncodedDocument(tokens, Source.TEXT)


def picture(data: bytes) -> EncodedDocument:
    return EncodedDocument(np.asarray([2, *[10] * 196, 3, 7]), Source.IMAGE, [MediaItem("image", data, 1, 196)])


@pytest.fixture
def prefixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(module, "BLOCK_DOCUMENTS", 3)
    shards = {
        "a": [text(0), text(1), text(0), picture(b"one"), text(2, 3), text(2, 3)],
        "b": [text(1), picture(b"two"), picture(b"one"), text(0, changed=20), text(1, changed=200), text(3)],
    }
    for name, documents in shards.items():
        with ShardWriter(tmp_path / name, tokenizer=INFO) as writer:
            for document in documents:
                writer.add(document)
    return [str(tmp_path / name) for name in shards]


def listed(prefix: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in Path(f"{prefix}.rejected.jsonl").read_text().splitlines()]
    return {Path(line["path"]).name: line["reason"] for line in lines}


def test_the_first_of_equal_documents_stays(prefixes: list[str], tmp_path: Path) -> None:
    counts = deduplicate(prefixes, output_prefix=str(tmp_path / "out"))
    a = prefixes[0]
    assert listed(tmp_path / "out") == {
        "a:2": f"the same as {a}:0",
        "a:5": f"the same as {a}:4",
        "b:0": f"the same as {a}:1",
        "b:2": f"the same as {a}:3",
    }
    assert (counts.documents, counts.rejected, counts.media) == (8, 4, {"image": 2})
    copy = ShardReader(tmp_path / "out")
    copy.verify()
    for number, document in enumerate([text(0), text(1), picture(b"one"), text(2, 3), picture(b"two")]):
        np.testing.assert_array_equal(copy.tokens(number), document.tokens)
        assert [copy.media_bytes(item) for item in copy.media(number)] == [item.data for item in document.media]


def test_similar_texts_are_left_out_and_others_stay(prefixes: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/shards.py"), "deduplicate", *prefixes, "--near", "0.8"]
    tool = subprocess.run([*command, "--output-prefix", str(tmp_path / "out")], capture_output=True, text=True)
    assert tool.returncode == 0, tool.stderr
    found = listed(tmp_path / "out")
    assert found.keys() == {"a:2", "a:5", "b:0", "b:2", "b:3"}, "400 tokens of which 20 differ, not 200"
    assert found["b:3"].startswith(f"resembles {prefixes[0]}:0 (0.")
    assert "12 documents: 7 stay, 5 are listed" in tool.stdout
