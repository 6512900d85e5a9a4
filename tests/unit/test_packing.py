"""Packing: nothing lost, nothing that fits cut, no media run cut, and C++ as the reference."""

import numpy as np
import pytest
from small import VOCAB_SIZE

from megatron_mm.data import _index, packing
from megatron_mm.data.packing import pack_best_fit, pack_best_fit_reference, plan_packing
from megatron_mm.errors import DataError
from megatron_mm.modality import Media, Source
from megatron_mm.shards import EncodedDocument, MediaItem, ShardReader, ShardWriter, TokenizerInfo

INFO = TokenizerInfo("0" * 64, VOCAB_SIZE, {"image": 10, "audio": 11})


def shards_of(tmp_path, documents: list[EncodedDocument]) -> list[ShardReader]:
    with ShardWriter(tmp_path / "p", tokenizer=INFO) as writer:
        for document in documents:
            writer.add(document)
    return [ShardReader(tmp_path / "p")]


def text(length: int) -> EncodedDocument:
    return EncodedDocument(np.ones(length, np.int64), Source.TEXT)


def page(*parts: int) -> EncodedDocument:
    """A document of text (positive) and image runs (negative), each run inside a start and an end token."""
    tokens, media = [], []
    for part in parts:
        if part > 0:
            tokens += [1] * part
            continue
        media.append(MediaItem(Media.IMAGE, b"x", len(tokens) + 1, -part))
        tokens += [2, *[10] * -part, 3]
    return EncodedDocument(np.asarray([*tokens, 0]), Source.PDF, media)


@pytest.mark.parametrize("capacity", [1, 2, 63, 64, 65, 100, 4_095, 4_096, 8_192])
@pytest.mark.parametrize(("window", "max_open"), [(1, 3), (50, 4), (10_000, 100), (40, 0)])
def test_the_extension_packs_as_the_reference(capacity: int, window: int, max_open: int) -> None:
    rng = np.random.default_rng(capacity)
    lengths = np.minimum(np.exp(rng.normal(np.log(capacity / 4 + 1), 1.0, 700)), capacity).astype(np.int32).clip(1)
    native, num_native = _index.pack_best_fit(lengths, capacity, window, max_open)
    bins, num_bins = pack_best_fit_reference(lengths, capacity, window=window, max_open=max_open)
    assert num_native == num_bins
    np.testing.assert_array_equal(native, bins)
    assert np.bincount(bins, weights=lengths).max() <= capacity
    assert sorted(set(bins)) == list(range(num_bins))


def test_nothing_to_pack_is_no_bins() -> None:
    bins, num_bins = pack_best_fit(np.zeros(0, np.int32), 8)
    assert (len(bins), num_bins) == (0, 0)


def test_lengths_outside_the_capacity_are_refused() -> None:
    for lengths in ([0], [9]):
        with pytest.raises(ValueError, match="outside 1..capacity"):
            _index.pack_best_fit(np.asarray(lengths, np.int32), 8, 10, 10)


def test_padding_of_ordinary_lengths_is_small() -> None:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(1000) - 1.3**2 / 2, 1.3, 100_000)).clip(1, 8192).astype(np.int32)
    _, num_bins = pack_best_fit(lengths, 8192)
    assert 1 - lengths.sum(dtype=np.int64) / (num_bins * 8192) < 0.001


def test_every_input_is_in_one_sample(tmp_path) -> None:
    rng = np.random.default_rng(0)
    documents = [text(int(length)) for length in rng.integers(1, 400, 200)]
    documents += [
        page(*parts) for parts in ((50, -30, 80), (-30, -30, -30, -30), (300, -20, 5), (120, -40, 1, -40, 200))
    ]
    (shard,) = shards = shards_of(tmp_path, documents)
    plan = plan_packing(shards, seq_len=128)
    covered = [np.zeros(max(0, len(document.tokens) - 1), int) for document in documents]
    for sample in range(plan.num_samples):
        pieces = plan.sample(sample)
        assert 0 < pieces["length"].sum() <= 128
        for piece in pieces:
            covered[piece["document"]][piece["start"] : piece["start"] + piece["length"]] += 1
    assert all((count == 1).all() for count in covered), "each token but the last is an input exactly once"
    pieces_of = np.bincount(plan.pieces["document"].astype(int), minlength=len(documents))
    inputs = shard.lengths - 1
    assert (pieces_of[(inputs > 0) & (inputs <= 128)] == 1).all(), "a document that fits is never cut"
    assert plan.padding_fraction == pytest.approx(1 - inputs.clip(0).sum() / (plan.num_samples * 128))


def test_a_media_run_is_never_cut(tmp_path) -> None:
    documents = [
        page(*parts) for parts in ((100, -60, 100), (70, -60, -60, 3, -60), (-100, -20), (126, -1, 300, -90, 40))
    ]
    shards = shards_of(tmp_path, documents)
    plan = plan_packing(shards, seq_len=128)
    for piece in plan.pieces:
        start, stop = int(piece["start"]), int(piece["start"] + piece["length"])
        for item in shards[0].media(int(piece["document"])):
            first, last = int(item["token_offset"]), int(item["token_offset"] + item["num_tokens"])
            assert stop <= first - 1 or start >= last + 1 or (start <= first - 1 and stop >= last), (piece, first, last)


def test_a_run_longer_than_a_sample_is_said(tmp_path) -> None:
    shards = shards_of(tmp_path, [text(5), page(10, -200, 10)])
    with pytest.raises(
        DataError, match=r"document 1 has a media run of 202 tokens, which data\.seq_len=128 cannot hold"
    ):
        plan_packing(shards, seq_len=128)


def test_documents_without_inputs_are_left_out(tmp_path) -> None:
    plan = plan_packing(shards_of(tmp_path, [text(1), text(2), text(1)]), seq_len=8)
    assert plan.pieces.tolist() == [(0, 1, 0, 1)]
    with pytest.raises(DataError, match="no document has two tokens"):
        plan_packing(shards_of(tmp_path, [text(1)]), seq_len=8)


def test_without_the_extension_the_plan_is_the_same(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = shards_of(tmp_path, [text(int(length)) for length in np.random.default_rng(1).integers(1, 300, 300)])
    native = plan_packing(shards, seq_len=64)
    monkeypatch.setattr(packing, "_index", None)
    plain = plan_packing(shards, seq_len=64)
    assert plain.pieces.tolist() == native.pieces.tolist()
    assert plain.first_piece.tolist() == native.first_piece.tolist()
