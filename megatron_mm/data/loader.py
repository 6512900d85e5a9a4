"""From a step number to this rank's micro-batches: a pure function of (seed, step), read ahead in the background."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_mm.batch import MediaUnits, MicroBatch, attention_spans, context_spans
from megatron_mm.config import Config
from megatron_mm.config.schema import BlendChange
from megatron_mm.data.media import make_decoders
from megatron_mm.data.samples import Samples
from megatron_mm.data.token_row import TokenRow
from megatron_mm.engine import device
from megatron_mm.engine.mesh import Mesh
from megatron_mm.errors import DataError
from megatron_mm.modalities import BY_KIND, BY_NAME, Modality
from megatron_mm.shards import DamagedItem, ShardReader

log = logging.getLogger(__name__)

NO_MEDIA = MediaUnits((), 0, 0, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True)
class Unit:
    """What is encoded on its own, an image or a chunk of audio: where it lies and where its features go."""

    shard: int
    item: np.ndarray
    """ITEM record."""
    number: int
    """Which unit of its item."""
    position: int
    """The position of its first token in the micro-batch."""
    num_tokens: int

    @property
    def run(self) -> range:
        """Its positions in the micro-batch."""
        return range(self.position, self.position + self.num_tokens)


class Loader:
    """Reads packed samples of one dataset, or of a blend of several, for one rank.

    Every rank reads tokens by itself; media only where the encoders are, and there only the units dealt to this rank.
    """

    def __init__(
        self,
        datasets: Sequence[str] | Mapping[str, float],
        *,
        config: Config,
        mesh: Mesh,
        changes: Sequence[BlendChange] = (),
        report_apart: bool = False,
    ) -> None:
        """Open the datasets; with `report_apart`, losses are told by each of a list's prefixes, not by the list."""
        self.config, self.mesh = config, mesh
        self.samples = Samples(datasets, config=config, changes=changes)
        self.shards = self.samples.shards
        names = self.samples.shard_prefixes if report_apart else self.samples.shard_datasets
        self.datasets = list(dict.fromkeys(names)) if report_apart else self.samples.datasets
        """The names that losses are reported by, in the order of their numbers in a micro-batch."""
        self._dataset_of = [self.datasets.index(name) for name in names]
        """The dataset of each shard, by its number."""
        self.special_ids = self.shards[0].tokenizer.special_ids
        self._placeholders = [self.special_ids[name] for name in BY_NAME if name in self.special_ids]
        self._encodes = mesh.is_first_chunk(0)
        self.renew_decoders()
        if self._encodes and mesh.is_rank_0:
            names = dict.fromkeys(decoder.name for decoder in self.decoders.values())
            log.info("media are decoded by %s", " and ".join(names))

    def renew_decoders(self) -> None:
        """Take new decoders: a thread that hangs may hold the old ones."""
        self.decoders = make_decoders(self.config, has_gpu=device.has_gpu())

    @property
    def num_samples(self) -> int:
        """Samples of all datasets."""
        return self.samples.num_samples

    def step_samples(self, step: int) -> np.ndarray:
        """Return the samples of optimizer step `step`, counted from 0, in global order: (batch_size,) int64."""
        return self.samples.of_step(step)

    def step(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of optimizer step `step`."""
        return self.micro_batches(self.step_samples(step))

    def micro_batches(self, samples: np.ndarray) -> list[MicroBatch]:
        """Return this rank's share of `samples`: sample i goes to micro-batch i // (dp micro_batch_size).

        A sample of -1 is empty: padding without loss.
        """
        size = self.config.training.micro_batch_size
        shares = samples.reshape(-1, self.mesh.dp_size, size)[:, self.mesh.dp_rank]
        return [self.micro_batch(share) for share in shares]

    def micro_batch(self, samples: Sequence[int]) -> MicroBatch:
        """Return `samples` packed end to end, with the media units that this rank encodes."""
        seq_len = self.config.data.seq_len
        num_tokens = len(samples) * seq_len
        text = TokenRow(num_tokens, pad=self.special_ids["pad"], placeholders=self._placeholders)
        units: dict[str, list[Unit]] = {name: [] for name in BY_NAME}
        for number, sample in enumerate(samples):
            text.position = number * seq_len
            if sample >= 0:
                self._add_pieces(self.samples.pieces(int(sample)), text, units)
            text.end_sample((number + 1) * seq_len)
        if any(units.values()):
            text.mask_labels()
        cp_rank, cp_size = self.mesh.cp_rank, self.mesh.cp_size
        parts = context_spans(num_tokens, cp_rank=cp_rank, cp_size=cp_size)
        return MicroBatch(
            **text.tensors(parts),
            spans=attention_spans(text.doc_lengths, cp_rank=cp_rank, cp_size=cp_size),
            media={name: self._media(name, own, parts) for name, own in units.items()},
            counts=text.counts(parts, media={name: [unit.run for unit in own] for name, own in units.items()}),
            num_datasets=len(self.datasets),
        )

    def _add_pieces(self, pieces: np.ndarray, text: TokenRow, units: dict[str, list[Unit]]) -> None:
        """Lay PIECE records at the current position, and note their media."""
        first, last = int(pieces["shard"][0]), int(pieces["shard"][-1])
        for number in range(first, last + 1):  # pieces come in the order of their shards
            shard, own = self.shards[number], pieces[pieces["shard"] == number] if first < last else pieces
            begin = position = text.position
            num_placeholders = text.add_pieces(shard, own, dataset=self._dataset_of[number])
            for _, document, start, length in own.tolist() if shard.num_items else ():
                self._add_media(number, document, range(start, start + length), text, position, units)
                position += length
            if num_placeholders or shard.num_items:
                self._check_placeholders(shard, own, range(begin, text.position), text, units)

    def _add_media(
        self,
        number: int,
        document: int,
        inputs: range,
        text: TokenRow,
        position: int,
        units: dict[str, list[Unit]],
    ) -> None:
        """Note the media among `inputs` of a document of shard `number`, which lie at `position`."""
        shard = self.shards[number]
        for item in shard.media(document):
            start, num_tokens = int(item["token_offset"]), int(item["num_tokens"])
            if start + num_tokens <= inputs.start or start >= inputs.stop:
                continue
            modality, lengths = self._lengths(item, f"{shard.prefix}: document {document}")
            first = position + start - inputs.start
            run = text.tokens[first : first + num_tokens]
            is_whole = inputs.start <= start and start + num_tokens <= inputs.stop
            if not is_whole or (run != self.special_ids[modality.name]).any():
                raise DataError(
                    f"{shard.prefix}: document {document} has not the {num_tokens} placeholders at token {start} that "
                    "its media run should be; its .bin and .media.idx do not belong together. Preprocess the inputs "
                    "again."
                )
            for unit, length in enumerate(lengths):
                units[modality.name].append(Unit(number, item, unit, first, length))
                first += length

    def _lengths(self, item: np.ndarray, where: str) -> tuple[Modality, list[int]]:
        """Return what a media item is, and the tokens of each of its units.

        Raises DataError if there is no such modality, or none of its items has so many tokens.
        """
        kind, num_tokens = int(item["kind"]), int(item["num_tokens"])
        if kind not in BY_KIND:
            raise DataError(f"{where} has a media item of kind {kind}, which is none. Preprocess the inputs again.")
        if num_tokens < 1:
            raise DataError(f"{where} has a media item without placeholders. Preprocess the inputs again.")
        modality = BY_KIND[kind]
        lengths = modality.unit_lengths(num_tokens, getattr(self.config, modality.name))
        if sum(lengths) != num_tokens:
            raise DataError(
                f"{where} has an item of {num_tokens} {modality.name} placeholders, and none becomes so many tokens: "
                f"the shards were written for another size of it. Preprocess the inputs again."
            )
        return modality, lengths

    def _check_placeholders(
        self, shard: ShardReader, pieces: np.ndarray, place: range, text: TokenRow, units: dict[str, list[Unit]]
    ) -> None:
        """Raise DataError if a placeholder at `place`, where pieces were laid last, is of no media item, or of two."""
        laid = text.tokens[place.start : place.stop]
        for name in units:
            unclaimed = laid == self.special_ids.get(name, -1)
            if units[name]:
                unclaimed = unclaimed.astype(np.int64)
            for unit in reversed(units[name]):
                if unit.position < place.start:
                    break
                unclaimed[unit.position - place.start : unit.position - place.start + unit.num_tokens] -= 1
            if np.count_nonzero(unclaimed):
                first = int((unclaimed != 0).argmax())
                document = int(pieces["document"][pieces["length"].cumsum().searchsorted(first, "right")])
                raise DataError(
                    f"{shard.prefix}: document {document} has {name} placeholders that belong to no media "
                    "item, or to more than one; its .bin and .media.idx do not belong together. Preprocess the inputs "
                    "again."
                )

    def _media(self, name: str, units: list[Unit], parts: list[range]) -> MediaUnits:
        """Deal units over tp and cp and decode this rank's; `parts` are the positions of its context rank."""
        if not self._encodes:
            return NO_MEDIA
        return media_units(units, parts, mesh=self.mesh, decode=lambda own: self._decode(name, own))

    def _decode(self, name: str, units: list[Unit]) -> Iterator[Tensor]:
        """Yield the tensors of units of one modality; of an item that is damaged or cannot be decoded, blanks.

        Raises DataError if an item becomes other tokens than its document has for it.
        """
        items = {(unit.shard, int(unit.item["offset"])): unit.item for unit in units}
        encoded = {key: data for key, item in items.items() if (data := self._encoded(key[0], item)) is not None}
        decoded = dict.fromkeys(items) | dict(
            zip(encoded, self.decoders[name].decode(list(encoded.values())), strict=True)
        )
        for key, own in decoded.items():
            prefix, num_tokens = self.shards[key[0]].prefix, int(items[key]["num_tokens"])
            if own is None:
                if key in encoded:
                    log.warning("%s.media.bin: the item at byte %d cannot be decoded: it is left blank", prefix, key[1])
                decoded[key] = self.decoders[name].blank(num_tokens)
            elif (found := self.decoders[name].num_tokens(own)) != num_tokens:
                raise DataError(
                    f"{prefix}.media.bin: the item ({name}) at byte {key[1]} decodes to {found} tokens, and its "
                    f"document has {num_tokens} placeholders for it. It is not what was written, or "
                    f"{self.decoders[name].name} reads it otherwise. Preprocess the inputs again."
                )
        for unit in units:
            yield decoded[unit.shard, int(unit.item["offset"])][unit.number]

    def _encoded(self, shard: int, item: np.ndarray) -> bytes | None:
        """Return the bytes of an item, None if they are damaged: a run does not end for one image."""
        try:
            return self.shards[shard].media_bytes(item)
        except DamagedItem as error:
            log.warning("%s It is left blank.", error)
            return None


def media_units(
    units: list[Unit], parts: list[range], *, mesh: Mesh, decode: Callable[[list[Unit]], Iterable[Tensor]]
) -> MediaUnits:
    """Deal units over tp and cp and decode this rank's; `parts` are the positions of its context rank."""
    if not units:
        return NO_MEDIA
    own = np.concatenate([np.arange(part.start, part.stop) for part in parts])
    num_ranks, rank = mesh.cp_size * mesh.tp_size, mesh.cp_rank * mesh.tp_size + mesh.tp_rank
    rows, positions, rows_per_rank = deal_rows(units, num_ranks=num_ranks)
    place = np.full(own.size * mesh.cp_size, -1)  # of each position of the row, on this rank
    shard = own.reshape(mesh.tp_size, -1)[mesh.tp_rank]
    place[shard] = np.arange(shard.size)
    local = place[positions] >= 0
    return MediaUnits(
        inputs=tuple(decode(units[rank::num_ranks])),
        own_rows=sum(unit.num_tokens for unit in units[rank::num_ranks]),
        rows_per_rank=rows_per_rank,
        rows=torch.from_numpy(rows[local]),
        positions=torch.from_numpy(place[positions[local]]),
    )


def deal_rows(units: Sequence[Unit], *, num_ranks: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (gathered row, position) of every media token, and the rows that each rank contributes.

    Unit u is encoded by rank u mod num_ranks; a rank's features stand end to end, padded to the longest rank's, rank
    after rank. Shapes: rows, positions (num_media_tokens,) int64.
    """
    totals = [sum(unit.num_tokens for unit in units[rank::num_ranks]) for rank in range(num_ranks)]
    rows_per_rank = max(totals, default=0)
    filled = [rank * rows_per_rank for rank in range(num_ranks)]
    rows, positions = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number, unit in enumerate(units):
        rank = number % num_ranks
        rows.append(filled[rank] + np.arange(unit.num_tokens))
        positions.append(unit.position + np.arange(unit.num_tokens))
        filled[rank] += unit.num_tokens
    return np.concatenate(rows), np.concatenate(positions), rows_per_rank
