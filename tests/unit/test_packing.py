"""Packing: nothing lost, nothing that fits cut, no media run cut, and C++ as the reference."""

import numpy as np
import pytest
from small import VOCAB_SIZE

from megatron_mm.data import _index, packing
from megatron_mm.data.packing import (
    NO_CUTS,
    count_samples,
    count_samples_reference,
    lay_end_to_end,
    lay_end_to_end_reference,
    pack_best_fit_reference,
    pack_sample,
    pack_sample_reference,
    pack_window_reference,
    padding_fraction,
    plan_packing,
)
from megatron_mm.errors import DataError
from megatron_mm.shards import EncodedDocument, MediaItem, ShardReader, ShardWriter, TokenizerInfo
from megatron_mm.source import Source

INFO = TokenizerInfo("0" * 64, VOCAB_SIZE, {"image": 10, "audio": 11})


def shards_of(tmp_path, documents: list[EncodedDocument]) -> list[ShardReader]:
    with ShardWriter(tmp_path / "p", tokenizer=INFO) as writer:
        for document in documents:
            writer.add(document)
    return [ShardReader(tmp_path / "p")]


def text(length: int) -> EncodedDocument:
    return EncodedDocument(np.ones(length, np.int64), Source.TEXT)


def page(*parts: int) -> EncodedDocument:
    """A document of text (positive) and sound (negative), each run inside a start and an end token."""
    tokens, media = [], []
    for part in parts:
        if part > 0:
            tokens += [1] * part
            continue
        media.append(MediaItem("audio", b"x", len(tokens) + 1, -part))
        tokens += [2, *[11] * -part, 3]
    return EncodedDocument(np.asarray([*tokens, 0]), Source.PDF, media)


def pieces_of(plan: packing.PackingPlan) -> np.ndarray:
    return np.concatenate([plan.sample(sample) for sample in range(plan.num_samples)])


@pytest.mark.parametrize("capacity", [1, 2, 63, 64, 65, 100, 4_095, 4_096, 8_192])
def test_the_extension_packs_as_the_reference(capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    lengths = np.minimum(np.exp(rng.normal(np.log(capacity / 4 + 1), 1.0, 700)), capacity).astype(np.int32).clip(1)
    native, num_native = _index.pack_best_fit(lengths, capacity)
    bins, num_bins = pack_best_fit_reference(lengths, capacity)
    assert num_native == num_bins
    np.testing.assert_array_equal(native, bins)
    assert np.bincount(bins, weights=lengths).max() <= capacity
    assert sorted(set(bins)) == list(range(num_bins))


@pytest.mark.parametrize("is_last", [True, False])
def test_the_extension_counts_windows_as_the_reference(is_last: bool) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 300, 900).astype(np.int32)
    lengths[[5, 6, 700]] = 201  # cut elsewhere than at each 64 inputs
    cuts = (np.asarray([5, 700]), np.asarray([0, 4, 8]), np.asarray([50, 64, 64, 22, 64, 10, 63, 63], np.int32))
    native = _index.count_samples(lengths, 64, 64 * 40, is_last, *cuts, 3)
    plain = count_samples_reference(lengths, 64, cuts, window_inputs=64 * 40, is_last=is_last)
    assert len(plain.ends) > 10
    for ours, reference in zip(native, plain, strict=True):
        np.testing.assert_array_equal(ours, reference)


def test_the_extension_packs_each_sample_as_the_reference(tmp_path) -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 400).astype(np.int32)
    lengths[[5, 6, 300]] = 201
    (reader,) = shards_of(tmp_path, [text(3)] * 10 + [*map(text, lengths)] + [text(4)])
    cuts = (np.asarray([5, 300]), np.asarray([0, 4, 8]), np.asarray([50, 64, 64, 22, 64, 10, 63, 63], np.int32))
    *pieces, samples = pack_window_reference(lengths, 64, cuts)
    for sample in range(int(samples.max()) + 2):
        ours = pack_sample(reader, range(10, 410), 64, cuts, sample, number=7)
        assert ours.tolist() == pack_sample_reference(reader, range(10, 410), 64, cuts, sample, number=7).tolist()
        assert ours["shard"].tolist() == [7] * len(ours)
        for name, reference in zip(("document", "start", "length"), (pieces[0] + 10, *pieces[1:]), strict=True):
            np.testing.assert_array_equal(ours[name], reference[samples == sample])


@pytest.mark.parametrize("capacity", [1, 2, 65, 4_096, 8_192])
def test_counting_makes_as_many_samples_as_packing(capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    for largest in (2, capacity // 3 + 2, capacity, 3 * capacity):
        lengths = rng.integers(1, largest + 1, 3_000).astype(np.int32)
        inputs = lengths - 1
        sizes = np.concatenate([np.repeat(capacity, (inputs // capacity).sum()), (inputs % capacity)]).astype(np.int32)
        _, packed = _index.pack_best_fit(sizes[sizes > 0], capacity)
        _, samples, *_ = _index.count_samples(lengths, capacity, 2**40, True, *NO_CUTS, 1)
        assert samples.tolist() == [packed], largest


def test_nothing_to_pack_is_no_bins(tmp_path) -> None:
    bins, num_bins = _index.pack_best_fit(np.zeros(0, np.int32), 8)
    assert (len(bins), num_bins) == (0, 0)
    (reader,) = shards_of(tmp_path, [text(1)] * 3)
    assert len(pack_sample(reader, range(3), 8, NO_CUTS, 0, number=0)) == 0


def test_lengths_outside_the_capacity_are_refused(tmp_path) -> None:
    for lengths in ([0], [9]):
        with pytest.raises(ValueError, match="outside 1..capacity"):
            _index.pack_best_fit(np.asarray(lengths, np.int32), 8)
    (shard,) = shards_of(tmp_path, [text(1)] * 3)
    with pytest.raises(ValueError, match="cuts do not fit together"):
        pack_sample(shard, range(3), 8, (np.zeros(2, np.int64), *NO_CUTS[1:]), 0, number=0)
    with pytest.raises(ValueError, match="samples at 0"):
        pack_sample(shard, range(3), 8, NO_CUTS, -1, number=0)
    assert _index.pack_sample(shard.token_index, 2, 4, 8, *NO_CUTS, 0, 0) is None


@pytest.mark.parametrize("mean", [100, 1_000, 4_000])
def test_padding_of_ordinary_lengths_is_small(mean: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(mean) - 1.3**2 / 2, 1.3, 20_000_000 // mean)).clip(2, 10**6).astype(np.int32)
    windows = count_samples(lengths, 8192, NO_CUTS, is_last=False)
    inputs = windows.num_tokens - windows.ends[-1]
    assert 0 <= 1 - inputs / (windows.samples.sum() * 8192) < 0.01


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
    number_of = np.bincount(pieces_of(plan)["document"].astype(int), minlength=len(documents))
    inputs = shard.lengths() - 1
    assert (number_of[(inputs > 0) & (inputs <= 128)] == 1).all(), "a document that fits is never cut"
    assert padding_fraction(plan) == pytest.approx(1 - inputs.clip(0).sum() / (plan.num_samples * 128))


def test_a_media_run_is_never_cut(tmp_path) -> None:
    documents = [
        page(*parts) for parts in ((100, -60, 100), (70, -60, -60, 3, -60), (-100, -20), (126, -1, 300, -90, 40))
    ]
    shards = shards_of(tmp_path, documents)
    plan = plan_packing(shards, seq_len=128)
    for piece in pieces_of(plan):
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
    assert pieces_of(plan).tolist() == [(0, 1, 0, 1)]
    with pytest.raises(DataError, match="no document has two tokens"):
        plan_packing(shards_of(tmp_path, [text(1)]), seq_len=8)


def test_without_the_extension_the_plan_is_the_same(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW_SAMPLES", 20)
    documents = [text(int(length)) for length in np.random.default_rng(1).integers(1, 300, 300)]
    shards = shards_of(tmp_path, [*documents, page(70, -20, 60), *documents])
    native = pieces_of(plan_packing(shards, seq_len=64)).tolist()
    monkeypatch.setattr(packing, "_index", None)
    assert pieces_of(plan_packing(shards, seq_len=64)).tolist() == native


def test_a_plan_does_not_depend_on_how_much_is_scanned_at_a_time(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW_SAMPLES", 5)
    shards = shards_of(tmp_path, [text(int(length)) for length in np.random.default_rng(2).integers(1, 90, 500)])
    whole = pieces_of(plan_packing(shards, seq_len=64)).tolist()
    for scanned in (1, 7, 100):
        monkeypatch.setattr(packing, "SCANNED_DOCUMENTS", scanned)
        assert pieces_of(plan_packing(shards, seq_len=64)).tolist() == whole


def test_concatenation_lays_every_input_end_to_end(tmp_path) -> None:
    rng = np.random.default_rng(3)
    lengths = [[1, 5, 1, 1, 700, 2], rng.integers(1, 90, 300).tolist(), [1], [3]]
    shards = [
        shard for number, own in enumerate(lengths) for shard in shards_of(tmp_path / str(number), [*map(text, own)])
    ]
    plan = plan_packing(shards, seq_len=64, packing="concatenate", first_shard=10)
    expected = [
        (10 + shard, document, place)
        for shard, own in enumerate(lengths)
        for document, length in enumerate(own)
        for place in range(length - 1)
    ]
    found = [
        (int(piece["shard"]), int(piece["document"]), int(piece["start"]) + offset)
        for piece in pieces_of(plan)
        for offset in range(piece["length"])
    ]
    assert found == expected
    assert {int(plan.sample(sample)["length"].sum()) for sample in range(plan.num_samples - 1)} == {64}


def test_documents_end_to_end_are_found_as_by_the_reference(tmp_path) -> None:
    rng = np.random.default_rng(4)
    lengths = [1, 1, *rng.integers(1, 20, 2_000).tolist(), 1]
    (reader,) = shards_of(tmp_path, [*map(text, lengths)])
    inputs = sum(lengths) - len(lengths)
    for position in [0, inputs - 1, *rng.integers(0, inputs, 50).tolist()]:
        stop = int(rng.integers(position, inputs + 1))
        ours, reference = (
            find(reader, position, stop, number=3) for find in (lay_end_to_end, lay_end_to_end_reference)
        )
        assert ours.tolist() == reference.tolist()
        assert ours["length"].sum() == stop - position and set(ours["shard"].tolist()) <= {3}


def test_documents_end_to_end_are_not_found_in_a_damaged_index(tmp_path) -> None:
    (reader,) = shards_of(tmp_path, [text(5)] * 2_000)
    data = bytearray((tmp_path / "p.idx").read_bytes())
    data[34 + 4 * 2_000 + 8 * 1_000] ^= 1
    (tmp_path / "p.idx").write_bytes(data)
    for find in (lay_end_to_end, lay_end_to_end_reference):
        passed = reader._checksums._passed[".idx"]
        passed[:] = bytes(len(passed))  # as if opening had not looked at these pages
        with pytest.raises(DataError, match=r"p\.idx: bytes \d+ to \d+ differ from what was written"):
            find(reader, 3_990, 4_010, number=0)


@pytest.mark.parametrize("pack", [pack_sample, pack_sample_reference])
def test_nothing_is_packed_by_damaged_lengths(pack, tmp_path) -> None:
    (reader,) = shards_of(tmp_path, [text(5)] * 2_000)
    data = bytearray((tmp_path / "p.idx").read_bytes())
    data[34 + 4 * 1_000] ^= 1
    (tmp_path / "p.idx").write_bytes(data)
    passed = reader._checksums._passed[".idx"]
    passed[:] = bytes(len(passed))  # as if opening had not looked at these pages
    with pytest.raises(DataError, match=r"p\.idx: bytes \d+ to \d+ differ from what was written"):
        pack(reader, range(990, 1_010), 64, NO_CUTS, 0, number=0)


def test_concatenation_refuses_media_which_it_would_cut(tmp_path) -> None:
    with pytest.raises(DataError, match=r"holds media.*Use data\.packing=best_fit"):
        plan_packing(shards_of(tmp_path, [page(3, -20, 5)]), seq_len=64, packing="concatenate")
