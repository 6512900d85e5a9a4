"""Micro-batches: a pure function of seed and step, whole over all ranks, with loss only where it belongs."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import small_config, write_shards

from megatron_mm.batch import MicroBatch
from megatron_mm.data.loader import Loader, Prefetcher, deal_rows
from megatron_mm.errors import DataError
from megatron_mm.modality import Media


def mesh(tp_rank: int = 0, tp_size: int = 1, dp_rank: int = 0, dp_size: int = 1, first: bool = True) -> SimpleNamespace:
    """What a loader asks of a mesh."""
    return SimpleNamespace(
        tp_rank=tp_rank, tp_size=tp_size, dp_rank=dp_rank, dp_size=dp_size, is_first_chunk=lambda chunk: first
    )


def loader_of(shards: Path, *overrides: str, **place) -> Loader:
    config = small_config(shards, "unused", *overrides)
    return Loader(config.data.train, config=config, mesh=mesh(**place))


def assert_same(first: MicroBatch, second: MicroBatch) -> None:
    for name in ("tokens", "labels", "loss_mask", "sources", "positions", "cu_seqlens"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    for name in ("images", "audio"):
        ours, theirs = getattr(first, name), getattr(second, name)
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
        assert sum(micro_batch.doc_lengths) == micro_batch.num_tokens == 256
        assert micro_batch.cu_seqlens.tolist() == [0, *np.cumsum(micro_batch.doc_lengths)]
        start = 0
        for length in micro_batch.doc_lengths:
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


def test_every_loss_bearing_token_is_met_once_an_epoch(shards: Path) -> None:
    loader = loader_of(shards)
    shard = loader.shards[0]
    media = [shard.tokenizer.special_ids["image"], shard.tokenizer.special_ids["audio"]]
    expected = sum((~np.isin(shard.tokens(document)[1:], media)).sum() for document in range(shard.num_documents))
    batch = loader.micro_batch(range(loader.plan.num_samples))
    assert batch.loss_mask.sum().item() == expected


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_media_units_are_dealt_and_every_placeholder_is_filled_once(shards: Path, tp_size: int) -> None:
    config_shards = [loader_of(shards, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
    samples = config_shards[0].step_samples(0)
    batches = [loader.micro_batch(samples) for loader in config_shards]
    whole = loader_of(shards).micro_batch(samples)
    for kind, name in ((Media.IMAGE, "images"), (Media.AUDIO, "audio")):
        placeholder = config_shards[0].special_ids[kind.name.lower()]
        units = [getattr(batch, name) for batch in batches]
        shard_len = batches[0].num_tokens // tp_size
        filled = torch.cat([unit.positions + rank * shard_len for rank, unit in enumerate(units)])
        expected = torch.nonzero(batches[0].tokens == placeholder).flatten()
        assert torch.equal(filled.sort().values, expected)
        total = len(getattr(whole, name).inputs)
        assert total > 0
        assert [len(unit.inputs) for unit in units] == [len(range(rank, total, tp_size)) for rank in range(tp_size)]
        assert max(len(unit.inputs) for unit in units) == -(-total // tp_size), "no rank encodes more than its share"
        assert len({unit.rows_per_rank for unit in units}) == 1
        gathered = torch.cat([unit.rows for unit in units])
        assert len(gathered.unique()) == len(gathered), "each feature is laid once"


def test_rows_lead_to_the_features_of_the_right_unit() -> None:
    units = [SimpleNamespace(num_tokens=size, position=start) for size, start in ((3, 10), (2, 40), (4, 20), (1, 0))]
    rows, positions, rows_per_rank = deal_rows(units, tp_size=2)
    # Rank 0 encodes units 0 and 2 (7 rows), rank 1 units 1 and 3 (3 rows, padded to 7).
    features = np.asarray(
        [[0, 0], [0, 1], [0, 2], [2, 0], [2, 1], [2, 2], [2, 3], [1, 0], [1, 1], [3, 0], *[[9, 9]] * 4]
    )
    assert rows_per_rank == 7
    expected = [[unit, token] for unit, size in enumerate((3, 2, 4, 1)) for token in range(size)]
    assert features[rows].tolist() == expected
    assert positions.tolist() == [10, 11, 12, 40, 41, 20, 21, 22, 23, 0]
    assert deal_rows([], tp_size=3)[2] == 0


def test_later_stages_read_no_media(shards: Path) -> None:
    first, later = loader_of(shards), loader_of(shards, first=False)
    for shard in later.shards:
        shard.media_bytes = lambda item: pytest.fail("a later stage decoded media")
    for ours, theirs in zip(first.step(0), later.step(0), strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        assert theirs.images.inputs == theirs.audio.inputs == ()


def test_an_empty_sample_is_padding_without_loss(shards: Path) -> None:
    loader = loader_of(shards)
    batch = loader.micro_batch([-1])
    assert batch.loss_mask.sum() == 0
    assert batch.doc_lengths == (256,)
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


def test_a_vocabulary_that_is_too_small_is_refused(shards: Path) -> None:
    with pytest.raises(DataError, match=r"uses 320 ids, model\.vocab_size=256 has fewer"):
        loader_of(shards, "model.vocab_size=256")


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
        moved.cu_seqlens,
        moved.images.rows,
        *moved.images.inputs,
        *moved.audio.inputs,
    ]
    assert all(tensor.is_meta for tensor in tensors)
    assert moved.doc_lengths == batch.doc_lengths
    assert replace(moved, doc_lengths=()).doc_lengths == ()
