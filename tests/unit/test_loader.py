"""Micro-batches: a pure function of seed and step, whole over all ranks, with loss only where it belongs."""

import dataclasses
import functools
import json
import os
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import seal, small_config, write_shards

from megatron_mm.batch import MediaUnits, MicroBatch, TokenCounts, attention_spans, context_spans
from megatron_mm.data import prefetch, token_row
from megatron_mm.data.loader import Loader, deal_rows
from megatron_mm.data.packing import PIECE
from megatron_mm.data.prefetch import Prefetcher
from megatron_mm.errors import DataError, StorageFailed
from megatron_mm.modalities import BY_NAME
from megatron_mm.model.embedding import MediaEmbedding
from megatron_mm.shards import EncodedDocument, ShardReader, ShardWriter, TokenizerInfo
from megatron_mm.shards.format import ITEM
from megatron_mm.source import Source


def mesh(*, first: bool = True, **place: int) -> SimpleNamespace:
    """What a loader asks of a mesh."""
    ranks = {f"{axis}_rank": 0 for axis in ("tp", "cp", "dp")} | {f"{axis}_size": 1 for axis in ("tp", "cp", "dp")}
    return SimpleNamespace(**ranks | place, is_first_chunk=lambda chunk: first, is_rank_0=True)


def doc_lengths(batch: MicroBatch) -> tuple[int, ...]:
    """The documents of a micro-batch whose row is whole."""
    (span,) = batch.spans
    return span.query_lengths


def loader_of(shards: Path, *overrides: str, **place) -> Loader:
    config = small_config(shards, "unused", *overrides)
    return Loader(config.data.train, config=config, mesh=mesh(**place))


def assert_same(first: MicroBatch, second: MicroBatch) -> None:
    for name in ("tokens", "labels", "loss_mask", "origins", "positions"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert doc_lengths(first) == doc_lengths(second)
    for name in BY_NAME:
        ours, theirs = first.media[name], second.media[name]
        assert torch.equal(ours.rows, theirs.rows)
        assert all(torch.equal(a, b) for a, b in zip(ours.inputs, theirs.inputs, strict=True))


def test_a_step_is_a_function_of_seed_and_number(shards: Path) -> None:
    first, second = loader_of(shards), loader_of(shards)
    second.step(7)
    for ours, theirs in zip(first.step(3), second.step(3), strict=True):
        assert_same(ours, theirs)
    other = loader_of(shards, "data.seed=5")
    assert (other.step_samples(0) != first.step_samples(0)).any()


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(2, 1), (4, 1), (2, 2), (1, 4)])
def test_the_data_ranks_share_the_global_batch(shards: Path, dp_size: int, micro_batch_size: int) -> None:
    alone = loader_of(shards)
    whole = [micro_batch.tokens for micro_batch in alone.step(2)]
    shares = [
        loader_of(shards, f"training.micro_batch_size={micro_batch_size}", dp_rank=rank, dp_size=dp_size).step(2)
        for rank in range(dp_size)
    ]
    in_order = [share[number].tokens for number in range(len(shares[0])) for share in shares]
    assert torch.equal(torch.cat(in_order), torch.cat(whole))


def test_samples_come_in_the_same_order_in_every_layout(shards: Path) -> None:
    expected = [loader_of(shards).step_samples(step).tolist() for step in range(5)]
    for place in ({"dp_size": 2}, {"tp_size": 2, "tp_rank": 1}, {"first": False}):
        loader = loader_of(shards, **place)
        assert [loader.step_samples(step).tolist() for step in range(5)] == expected


def test_labels_are_the_next_tokens_of_the_same_document(shards: Path) -> None:
    loader = loader_of(shards)
    ids = loader.special_ids
    for micro_batch in (micro_batch for step in range(4) for micro_batch in loader.step(step)):
        assert sum(doc_lengths(micro_batch)) == micro_batch.tokens.numel() == 256
        (span,) = micro_batch.spans
        assert span.cu_seqlens_q.tolist() == span.cu_seqlens_kv.tolist() == [0, *np.cumsum(span.key_lengths)]
        start = 0
        for length in doc_lengths(micro_batch):
            place = slice(start, start + length)
            tokens, labels = micro_batch.tokens[place], micro_batch.labels[place]
            mask, positions = micro_batch.loss_mask[place], micro_batch.positions[place]
            assert positions.tolist() == list(range(length))
            assert len(set(micro_batch.sources[place].tolist())) == 1
            if (tokens == ids["pad"]).all():
                assert not mask.any()
            else:
                assert torch.equal(tokens[1:], labels[:-1])
                is_media = torch.isin(labels, torch.tensor([ids["image"], ids["audio"]]))
                assert torch.equal(mask == 0, is_media)
            start += length


@pytest.mark.parametrize("cp_size", [1, 2])
def test_positions_are_counted_by_what_they_hold(shards: Path, cp_size: int) -> None:
    loaders = [loader_of(shards, cp_rank=rank, cp_size=cp_size) for rank in range(cp_size)]
    ids = loaders[0].special_ids
    for samples in ([0, 3, 5, 9], [-1, 2], [-1]):
        for batch in [loader.micro_batch(samples) for loader in loaders]:
            of = {name: int((batch.tokens == ids[name]).sum()) for name in ("image", "audio", "pad")}
            text, loss = batch.tokens.numel() - sum(of.values()), int(batch.loss_mask.sum())
            assert batch.counts == TokenCounts.of([text, *of.values(), loss])
            assert batch.counts.padding_fraction == of["pad"] / batch.tokens.numel()


def test_every_token_says_which_dataset_it_is_of(tmp_path: Path) -> None:
    names = ("both", "left", "right", "more")
    both, left, right, more = (write_shards(tmp_path, name, seed=seed) for seed, name in enumerate(names))
    blend = f'data.train={{{both}: 0.5, "{left},{right}": 0.5}}'
    change = f"data.changes=[{{from_step: 3, train: {{{more}: 1.0}}}}]"
    config = small_config(both, "unused", blend, change)
    loader = Loader(config.data.train, config=config, mesh=mesh(), changes=config.data.changes)
    assert loader.datasets == config.data.train_datasets == [str(both), f"{left},{right}", str(more)]
    for step, expected in ((0, {0, 1}), (3, {2})):
        samples = loader.step_samples(step)
        datasets = loader.samples.first_sample.searchsorted(samples, "right") - 1
        assert set(datasets.tolist()) == expected
        batch = loader.micro_batch(samples)
        assert batch.num_datasets == 3
        laid = batch.tokens.view(-1, 256) != loader.special_ids["pad"]
        for dataset, sample, place in zip(datasets, batch.datasets.view(-1, 256), laid):
            assert set(sample[place].tolist()) == {dataset}
        assert set(batch.sources.tolist()) <= {int(source) for source in Source}


def test_held_out_prefixes_are_told_apart(tmp_path: Path) -> None:
    train, one, two = (write_shards(tmp_path, name, seed=seed) for seed, name in enumerate(("train", "one", "two")))
    config = small_config(train, "unused", f"data.validation=[{one}, {two}]")
    loader = Loader(config.data.validation, config=config, mesh=mesh(), report_apart=True)
    assert loader.datasets == config.data.validation_datasets == [str(one), str(two)]
    half = int(loader.num_samples / 2)
    for samples, dataset in ((range(half - 2), 0), (range(half + 2, loader.num_samples), 1)):
        batch = loader.micro_batch(list(samples))
        assert set(batch.datasets[batch.loss_mask > 0].tolist()) == {dataset}


def test_every_loss_bearing_token_is_met_once_an_epoch(shards: Path) -> None:
    loader = loader_of(shards)
    shard = loader.shards[0]
    media = [shard.tokenizer.special_ids["image"], shard.tokenizer.special_ids["audio"]]
    expected = sum((~np.isin(shard.tokens(document)[1:], media)).sum() for document in range(shard.num_documents))
    batch = loader.micro_batch(range(loader.num_samples))
    assert batch.loss_mask.sum().item() == expected


def all_ranks(shards: Path, *, cp_size: int, tp_size: int) -> list[Loader]:
    """The loaders of one replica's first stage, in the order of their ranks."""
    places = [{"cp_rank": cp, "tp_rank": tp} for cp in range(cp_size) for tp in range(tp_size)]
    return [loader_of(shards, **place, cp_size=cp_size, tp_size=tp_size) for place in places]


def position_in_row(batch: MicroBatch) -> torch.Tensor:
    """Where each position of a context rank lies in the whole row."""
    return torch.cat([torch.arange(span.start, span.stop) for span in batch.spans])


@pytest.mark.parametrize("cp_size", [2, 4])
def test_context_ranks_cut_the_row_of_one(shards: Path, cp_size: int) -> None:
    loaders = all_ranks(shards, cp_size=cp_size, tp_size=1)
    whole = loader_of(shards).step(1)
    for number, alone in enumerate(whole):
        parts = [loader.step(1)[number] for loader in loaders]
        order = torch.cat([position_in_row(part) for part in parts])
        assert torch.equal(order.sort().values, torch.arange(256))
        for name in ("tokens", "labels", "loss_mask", "origins", "positions"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(alone, name)[order]), name


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(16,), (1, 15), (5, 6, 5), (3, 9, 1, 3), (1,) * 16], ids=str)
def test_spans_hold_all_earlier_positions_of_the_same_document(lengths: tuple[int, ...], cp_size: int) -> None:
    document = np.repeat(np.arange(len(lengths)), lengths)
    seen = np.zeros((16, 16), bool)
    work = []
    for rank in range(cp_size):
        spans = attention_spans(lengths, cp_rank=rank, cp_size=cp_size)
        assert [range(span.start, span.stop) for span in spans] == context_spans(16, cp_rank=rank, cp_size=cp_size)
        for span in spans:
            query, key = span.start, span.key_start
            for num_queries, num_keys in zip(span.query_lengths, span.key_lengths, strict=True):
                for offset in range(num_queries):  # aligned at the end: the last query sees the last key
                    seen[query + offset, key : key + num_keys - (num_queries - 1 - offset)] = True
                query, key = query + num_queries, key + num_keys
            assert (query, key) == (span.stop, span.stop)
            assert span.cu_seqlens_q[-1] == span.stop - span.start
            assert span.cu_seqlens_kv[-1] == span.stop - span.key_start
        work.append(sum(span.stop * (span.stop + 1) - span.start * (span.start + 1) for span in spans))
    assert (seen == (document[:, None] == document[None, :]) & np.tri(16, dtype=bool)).all()
    assert len(set(work)) == 1, "each context rank has as many keys to attend to"


@pytest.mark.parametrize(("cp_size", "tp_size"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_media_units_are_dealt_and_every_placeholder_is_filled_once(shards: Path, cp_size: int, tp_size: int) -> None:
    loaders = all_ranks(shards, cp_size=cp_size, tp_size=tp_size)
    samples = loaders[0].step_samples(0)
    batches = [loader.micro_batch(samples) for loader in loaders]
    whole = loader_of(shards).micro_batch(samples)
    num_ranks = cp_size * tp_size
    for name in BY_NAME:
        placeholder = loaders[0].special_ids[name]
        units = [batch.media[name] for batch in batches]
        own = [position_in_row(batch).chunk(tp_size)[rank % tp_size] for rank, batch in enumerate(batches)]
        filled = torch.cat([place[unit.positions] for place, unit in zip(own, units)])
        expected = torch.nonzero(whole.tokens == placeholder).flatten()
        assert torch.equal(filled.sort().values, expected)
        total = len(whole.media[name].inputs)
        assert total > 0
        assert [len(unit.inputs) for unit in units] == [len(range(rank, total, num_ranks)) for rank in range(num_ranks)]
        assert max(len(unit.inputs) for unit in units) == -(-total // num_ranks), "no rank encodes more than its share"
        assert len({unit.rows_per_rank for unit in units}) == 1
        gathered = torch.cat([unit.rows for unit in units])
        assert len(gathered.unique()) == len(gathered), "each feature is laid once"


def test_rows_lead_to_the_features_of_the_right_unit() -> None:
    units = [SimpleNamespace(num_tokens=size, position=start) for size, start in ((3, 10), (2, 40), (4, 20), (1, 0))]
    rows, positions, rows_per_rank = deal_rows(units, num_ranks=2)
    # Rank 0 encodes units 0 and 2 (7 rows), rank 1 units 1 and 3 (3 rows, padded to 7).
    features = np.asarray(
        [[0, 0], [0, 1], [0, 2], [2, 0], [2, 1], [2, 2], [2, 3], [1, 0], [1, 1], [3, 0], *[[9, 9]] * 4]
    )
    assert rows_per_rank == 7
    expected = [[unit, token] for unit, size in enumerate((3, 2, 4, 1)) for token in range(size)]
    assert features[rows].tolist() == expected
    assert positions.tolist() == [10, 11, 12, 40, 41, 20, 21, 22, 23, 0]
    assert deal_rows([], num_ranks=3)[2] == 0


def change_item(prefix: Path, of: str, values: dict[str, int]) -> None:
    """Write other values into the record of the first item of a kind."""
    items = ShardReader(prefix)._items
    number = int((items["kind"] == BY_NAME[of].kind).argmax())
    changed = items[number].copy()
    for name, value in values.items():
        changed[name] = value
    data = bytearray(Path(f"{prefix}.media.idx").read_bytes())
    start = len(data) - (len(items) - number) * ITEM.itemsize
    data[start : start + ITEM.itemsize] = changed.tobytes()
    Path(f"{prefix}.media.idx").write_bytes(data)
    seal(prefix)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("image", {"num_tokens": 195}, "has an item of 195 image placeholders, and none becomes so many tokens"),
        ("image", {"kind": 7}, "has a media item of kind 7, which is none"),
        ("audio", {"kind": 1}, "has an item of [0-9]+ image placeholders"),
        ("audio", {"num_tokens": 5}, "has audio placeholders that belong to no media item"),
        ("audio", {"num_tokens": 0}, "has a media item without placeholders"),
        ("audio", {"token_offset": 9_999}, "has audio placeholders that belong to no media item"),
        ("image", {"token_offset": 0}, "has not the 196 placeholders at token 0"),
    ],
    ids=str,
)
def test_an_item_that_does_not_fit_its_placeholders_is_refused(
    kind: str, values: dict[str, int], message: str, tmp_path: Path
) -> None:
    prefix = write_shards(tmp_path)
    change_item(prefix, kind, values)
    for place in ({}, {"first": False}):
        loader = loader_of(prefix, **place)
        with pytest.raises(DataError, match=rf"{prefix}: document [0-9]+ {message}"):
            loader.micro_batch(range(loader.num_samples))


@pytest.mark.parametrize("change", [-400, 400])
def test_a_recording_of_another_length_is_refused_before_it_moves_its_neighbours(change: int, tmp_path: Path) -> None:
    prefix = write_shards(tmp_path)
    loader = loader_of(prefix)
    audio = loader.decoders["audio"]
    whole = audio.reference

    def other_length(data: bytes) -> torch.Tensor:
        waveform = whole(data)
        return waveform[:change] if change < 0 else torch.cat([waveform, torch.zeros(change)])

    audio.reference = other_length
    message = r"\.media\.bin: the item \(audio\) at byte \d+ decodes to \d+ tokens, and its document has \d+"
    with pytest.raises(DataError, match=message):
        loader.micro_batch(range(loader.num_samples))


def test_features_that_are_not_the_promised_ones_are_refused() -> None:
    mesh = SimpleNamespace(rank=3, tp_size=1, tp_cp_group=SimpleNamespace(size=lambda: 1))
    config = small_config("unused", "unused", "model.hidden_size=8", "model.head_dim=2")
    embedding = MediaEmbedding(BY_NAME["image"], config, mesh=mesh)
    image = torch.zeros(3, 224, 224, dtype=torch.uint8)
    rows = torch.arange(196)
    assert embedding(MediaUnits((image,), 196, 196, rows, rows)).shape == (196, 8)
    for promised in (190, 392):
        with pytest.raises(DataError, match=rf"rank 3: the image encoder made 196 features of 1 units .* {promised}:"):
            embedding(MediaUnits((image,), promised, 392, rows, rows))


def test_a_damaged_item_is_left_blank_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefix = write_shards(tmp_path)
    whole = loader_of(prefix)
    samples = range(whole.num_samples)
    expected, item = whole.micro_batch(samples), whole.shards[0]._items[0]
    data = bytearray(Path(f"{prefix}.media.bin").read_bytes())
    data[int(item["offset"]) + int(item["num_bytes"]) - 1] ^= 1  # where a decoder would not notice
    Path(f"{prefix}.media.bin").write_bytes(data)
    damaged = loader_of(prefix)
    found = damaged.micro_batch(samples)
    assert f"{prefix}.media.bin: the item at byte {item['offset']} does not match its checksum" in caplog.text
    assert "It is left blank." in caplog.text
    assert torch.equal(found.tokens, expected.tokens)
    differing = [not torch.equal(*pair) for pair in zip(found.media["image"].inputs, expected.media["image"].inputs)]
    assert sum(differing) == 1
    blank = found.media["image"].inputs[differing.index(True)]
    assert torch.equal(blank, damaged.decoders["image"].blank(int(item["num_tokens"]))[0])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".media.idx"])
def test_a_damaged_token_or_index_is_refused_with_and_without_the_extension(
    version: int, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write_shards(tmp_path)
    seal(prefix, version=version)
    loaders = [loader_of(prefix), loader_of(prefix)]
    data = bytearray(Path(f"{prefix}{suffix}").read_bytes())
    data[len(data) // 2] ^= 4
    Path(f"{prefix}{suffix}").write_bytes(data)
    message = rf"{prefix}{suffix}: bytes \d+ to \d+ differ from what was written"
    for loader, extension in zip(loaders, (token_row._index, None)):
        monkeypatch.setattr(token_row, "_index", extension)
        for own in loader.shards[0]._checksums._passed.values():
            own[:] = bytes(len(own))  # as if opening had not looked at these pages
        with pytest.raises(DataError, match=message):
            loader.micro_batch(range(loader.num_samples))


def test_later_stages_read_no_media(shards: Path) -> None:
    first, later = loader_of(shards), loader_of(shards, first=False)
    for shard in later.shards:
        shard.media_bytes = lambda item: pytest.fail("a later stage decoded media")
    for ours, theirs in zip(first.step(0), later.step(0), strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        assert [units.inputs for units in theirs.media.values()] == [(), ()]


def test_without_the_extension_rows_are_the_same(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loader_of(shards)
    native = [loader.step(step) for step in range(4)]
    monkeypatch.setattr(token_row, "_index", None)
    for step, micro_batches in enumerate(native):
        for ours, theirs in zip(micro_batches, loader.step(step), strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("vocab_size", [50_000, 200_000])
def test_pieces_in_any_order_are_laid_as_by_the_reference(version: int, vocab_size: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 6_000, 40)
    with ShardWriter(tmp_path / "p", tokenizer=TokenizerInfo("0" * 64, vocab_size, {"image": 7})) as writer:
        for number, length in enumerate(lengths):
            writer.add(EncodedDocument(rng.integers(8, vocab_size, length), Source(number % len(Source))))
    seal(tmp_path / "p", version=version)
    whole = [(0, document, 0, length - 1) for document, length in enumerate(lengths)]
    parts = [(0, document, start := rng.integers(length), (length - start) // 2) for _, document, _, length in whole]
    shuffled = [whole[number] for number in rng.permutation(len(whole))]
    for records in (whole, whole[::-1], parts, shuffled, [whole[3]] * 3, []):
        pieces = np.asarray(records, PIECE)
        placeholders = rng.choice(vocab_size, 500, replace=False).tolist()
        native, plain = ({} for _ in range(2))
        for rows in (native, plain):
            total = int(pieces["length"].sum())
            rows |= {name: np.full(total, -1) for name in ("tokens", "labels", "positions", "origins")}
            rows["loss_mask"] = np.full(total, -1, np.float32)
        reader = ShardReader(tmp_path / "p")
        reader.check_tokens(pieces["document"])
        numbers = pieces.view(np.int64).reshape(-1, 4)
        found = token_row._index.lay_pieces(reader.token_index, numbers, 9, [*placeholders, -1], **native)
        assert found == token_row.lay_pieces_reference(reader, pieces, 9, placeholders, tuple(plain.values()))
        for name, row in plain.items():
            np.testing.assert_array_equal(native[name], row)


def test_placeholders_in_shards_of_text_are_refused_with_and_without_the_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = ShardReader(write_shards(tmp_path)).tokenizer
    with ShardWriter(tmp_path / "p", tokenizer=tokenizer) as writer:
        for length in (100, 50):
            writer.add(EncodedDocument(np.full(length, 5), Source.TEXT))
    tokens = np.fromfile(tmp_path / "p.bin", np.uint16)
    tokens[120] = tokenizer.special_ids["image"]
    tokens.tofile(tmp_path / "p.bin")
    seal(tmp_path / "p")
    for extension in (token_row._index, None):
        monkeypatch.setattr(token_row, "_index", extension)
        with pytest.raises(DataError, match="document 1 has image placeholders that belong to no media item"):
            loader_of(tmp_path / "p").micro_batch([0])


def test_checksums_are_those_of_zlib() -> None:
    data = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    for size in [*range(200), 4095, 4096, 4999]:
        assert token_row._index.crc32(data[:size]) == zlib.crc32(data[:size]), size


def test_rows_that_do_not_fit_are_refused_and_a_short_file_is_said(tmp_path: Path) -> None:
    prefix = write_shards(tmp_path)
    loader = loader_of(prefix)
    lay = functools.partial(token_row._index.lay_pieces, first_origin=0, placeholders=[])
    names = ("tokens", "labels", "positions", "origins")
    rows = {name: np.zeros(1, np.int64) for name in names} | {"loss_mask": np.zeros(1, np.float32)}
    index, piece = loader.shards[0].token_index, np.asarray([[0, 1, 1, 1]])
    assert lay(index, piece, **rows) == 0
    for misfit in (piece * 2, -piece, piece[0]):
        with pytest.raises(ValueError, match="do not fit together|is negative|is four numbers"):
            lay(index, misfit, **rows)
    with pytest.raises(TypeError):  # a copy would be filled
        lay(index, piece, **rows | {"tokens": np.zeros(1, np.int32)})
    with pytest.raises(TypeError, match="an array of another type"):
        lay((*index[:6], index[6].astype(np.int64), *index[7:]), piece, **rows)
    with pytest.raises(ValueError, match="do not fit together"):
        lay((*index[:9], index[9][1:], *index[10:]), piece, **rows)
    for document, start in ((-1, 1), (10**9, 1), (1, -1), (1, 10**9)):
        assert lay(index, np.asarray([[0, document, start, 1]]), **rows) == -1
    os.truncate(f"{prefix}.bin", 10)
    with pytest.raises(DataError, match=r"\.bin: \d+ bytes at \d+ could not be read; it was cut short"):
        [loader.step(step) for step in range(8)]


def test_an_empty_sample_is_padding_without_loss(shards: Path) -> None:
    loader = loader_of(shards)
    batch = loader.micro_batch([-1])
    assert batch.loss_mask.sum() == 0
    assert doc_lengths(batch) == (256,)
    assert (batch.tokens == loader.special_ids["pad"]).all()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetching_gives_the_steps_in_order(shards: Path, ahead: int) -> None:
    loader = loader_of(shards)
    fetched = list(Prefetcher(loader, steps=range(2, 6), ahead=ahead))
    assert len(fetched) == 4
    for step, micro_batches in zip(range(2, 6), fetched):
        for ours, theirs in zip(loader.step(step), micro_batches, strict=True):
            assert_same(ours, theirs)


def test_a_reading_error_reaches_the_loop(shards: Path) -> None:
    loader = loader_of(shards)
    real = loader.step
    loader.step = lambda step: real(step) if step < 2 else (_ for _ in ()).throw(DataError("page lost"))
    fetched = iter(Prefetcher(loader, steps=range(5), ahead=1))
    next(fetched), next(fetched)
    with pytest.raises(DataError, match="page lost"):
        next(fetched)


def test_a_reader_that_hangs_is_named_and_its_step_read_by_another(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = loader_of(shards)
    real, released, decoders = loader.step, threading.Event(), loader.decoders

    def step(number: int) -> list[MicroBatch]:
        if number == 2 and threading.current_thread().name == "loader-0":
            released.wait()
        return real(number)

    loader.step = step
    batches = list(Prefetcher(loader, steps=range(4), ahead=1, stall_seconds=1.0))
    released.set()
    assert "loader-0 hangs in wait" in caplog.text and "step 2 is read again by a new thread" in caplog.text
    assert loader.decoders is not decoders, "the thread that hangs may hold the old one"
    assert len(batches) == 4
    for number, micro_batches in enumerate(batches):
        for ours, theirs in zip(real(number), micro_batches, strict=True):
            assert_same(ours, theirs)


def test_a_step_at_which_every_reader_hangs_or_dies_ends_the_run(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, released = loader_of(shards), threading.Event()
    loader.step = lambda step: released.wait()
    with pytest.raises(
        StorageFailed, match=r"step 0 could not be read by 3 threads, the last of which loader-2 hangs in"
    ):
        list(Prefetcher(loader, steps=range(4), ahead=1, stall_seconds=0.1))
    released.set()
    monkeypatch.setattr(prefetch._Reader, "_read", lambda self: None)
    with pytest.raises(StorageFailed, match=r"the last of which loader-2 is dead"):
        list(Prefetcher(loader, steps=range(4), ahead=1, stall_seconds=0.1))


def test_a_vocabulary_that_is_too_small_is_refused(shards: Path) -> None:
    with pytest.raises(DataError, match=r"uses 320 ids, model\.vocab_size=256 has fewer"):
        loader_of(shards, "model.vocab_size=256")


@pytest.mark.parametrize(
    ("override", "both"),
    [
        ("image.image_size=96", r"was made for image\.image_size=224, and the model has image\.image_size=96"),
        ("image.tiles=4", r"was made for image\.tiles=1, and the model has image\.tiles=4"),
        ("audio.chunk_samples=8000", r"was made for audio\.chunk_samples=16000, and the model has"),
    ],
)
def test_shards_that_were_made_for_another_model_are_refused(
    override: str, both: str, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=both):
        loader_of(shards, override)
    assert loader_of(write_shards(tmp_path, text_only=True), override).num_samples, "text does not depend on it"


def test_shards_of_a_version_that_recorded_nothing_are_of_the_defaults(tmp_path: Path) -> None:
    prefix = write_shards(tmp_path)
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    assert manifest.pop("modalities")["audio"] == {"chunk_samples": 16_000}
    Path(f"{prefix}.json").write_text(json.dumps(manifest))
    seal(prefix, version=1)
    assert loader_of(prefix).num_samples
    with pytest.raises(DataError, match=r"image\.patch_size=16, and the model has image\.patch_size=14"):
        loader_of(prefix, "image.patch_size=14", "image.image_size=224")


def test_tokens_and_media_of_different_shards_are_refused(tmp_path: Path) -> None:
    prefix = write_shards(tmp_path)
    loader = loader_of(prefix)
    shard = loader.shards[0]
    shifted = shard._items.copy()
    shifted["token_offset"] += 1
    shard._items = shifted
    with pytest.raises(DataError, match="do not belong together"):
        [loader.step(step) for step in range(8)]


def test_a_micro_batch_moves_whole(shards: Path) -> None:
    batch = loader_of(shards).micro_batch([0, 1, 2, 3])
    moved = batch.to(torch.device("meta"))
    tensors = [
        moved.tokens,
        moved.labels,
        moved.spans[0].cu_seqlens_q,
        moved.media["image"].rows,
        *(unit for units in moved.media.values() for unit in units.inputs),
    ]
    assert all(tensor.is_meta for tensor in tensors)
    assert doc_lengths(moved) == doc_lengths(batch)


@pytest.fixture(scope="module")
def blended(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three datasets of one tokenizer."""
    others = [write_shards(shards.parent, name, seed=seed) for name, seed in (("second", 1), ("third", 2))]
    return [str(shards), *map(str, others)]


def blend_of(weights: dict[str, float], *changes: str) -> Loader:
    pairs = ", ".join(f"{name}: {weight}" for name, weight in weights.items())
    config = small_config("unused", "unused", f"data.train={{{pairs}}}", f"data.changes=[{', '.join(changes)}]")
    return Loader(config.data.train, config=config, mesh=mesh(), changes=config.data.changes)


def test_a_blend_draws_by_weight_and_sees_every_sample_of_an_epoch_once(blended: list[str]) -> None:
    loader = blend_of({blended[0]: 3, blended[1]: 1})
    samples = np.concatenate([loader.step_samples(step) for step in range(40)])
    is_first = samples < loader.samples.first_sample[1]
    assert is_first.sum() == 240
    for own, plan in ((samples[is_first], loader.samples.plans[0]), (samples[~is_first], loader.samples.plans[1])):
        epoch = own[: plan.num_samples]
        assert len(set(epoch.tolist())) == len(epoch)


def test_a_dataset_added_later_leaves_the_past_and_repeats_nothing(blended: list[str]) -> None:
    before = blend_of({blended[0]: 3, blended[1]: 1})
    change = f"{{from_step: 3, train: {{{blended[0]}: 1, {blended[2]}: 1}}}}"
    after = blend_of({blended[0]: 3, blended[1]: 1}, change)
    for step in range(3):
        for ours, theirs in zip(before.step(step), after.step(step), strict=True):
            assert_same(ours, theirs)
    drawn = np.concatenate([after.step_samples(step) for step in range(5)])
    first = drawn[drawn < after.samples.first_sample[1]]
    assert len(set(first.tolist())) == min(len(first), after.samples.plans[0].num_samples), "it goes on where it was"
    assert (drawn[24:] >= after.samples.first_sample[2]).sum() == 8


def test_datasets_of_different_tokenizers_are_not_blended(blended: list[str], tmp_path: Path) -> None:
    info = dataclasses.replace(ShardReader(blended[0]).tokenizer, sha256="1" * 64)
    with ShardWriter(tmp_path / "other", tokenizer=info) as writer:
        writer.add(EncodedDocument(np.arange(9), Source.TEXT))
    with pytest.raises(DataError, match="different tokenizers"):
        blend_of({blended[0]: 1, str(tmp_path / "other"): 1})
