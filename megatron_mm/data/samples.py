"""The packed samples of one dataset, or of a blend of several, and which of them each optimizer step sees."""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_mm.config import Config
from megatron_mm.config.schema import BlendChange
from megatron_mm.data.blend import Blend
from megatron_mm.data.consumption import Consumption
from megatron_mm.data.order import SampleOrder
from megatron_mm.data.packing import PackingPlan, plan_packing
from megatron_mm.errors import DataError
from megatron_mm.shards import ShardReader, check_tokenizers, open_shards


class Samples:
    """Opened shards, packed, ordered and blended: what a step sees follows from the seed and what was consumed before.

    Samples are numbered dataset after dataset. Raises DataError if shards do not fit the model or one another.
    """

    def __init__(
        self, datasets: Sequence[str] | Mapping[str, float], *, config: Config, changes: Sequence[BlendChange] = ()
    ) -> None:
        self.config = config
        weights = datasets if isinstance(datasets, Mapping) else {",".join(datasets): 1.0}
        self._changes = [(0, weights), *((change.from_step, change.train) for change in changes)]
        self.datasets = list(dict.fromkeys(name for _, named in self._changes for name in named))
        """Names in the order in which they first appear."""
        self.shards: list[ShardReader] = []
        self.shard_datasets: list[str] = []
        """The dataset that each shard belongs to."""
        self.shard_prefixes: list[str] = []
        """The prefix that each shard was opened by: of the shards themselves, or of a list that was merged."""
        self.plans = [self._plan(name.split(",")) for name in self.datasets]
        self.orders = [SampleOrder(plan.num_samples, seed=config.data.seed) for plan in self.plans]
        self.first_sample = np.cumsum([0, *(plan.num_samples for plan in self.plans)])
        """Where the samples of each dataset begin: (num_datasets + 1,) int64."""
        self.follow(Consumption(((0, config.training.global_batch_size),)))

    def _plan(self, prefixes: Sequence[str]) -> PackingPlan:
        """Open the shards of one dataset. Raises DataError if they do not fit the model or the other datasets."""
        by_prefix = [open_shards([prefix]) for prefix in prefixes]
        shards = [shard for opened in by_prefix for shard in opened]
        tokenizer = shards[0].tokenizer
        if tokenizer.vocab_size > self.config.model.vocab_size:
            raise DataError(
                f"{prefixes[0]} uses {tokenizer.vocab_size} ids, model.vocab_size={self.config.model.vocab_size} has "
                "fewer. Use model.vocab_size of at least that, a multiple of parallel.tp."
            )
        check_tokenizers([*self.shards, *shards])
        for shard in shards:
            shard.check_geometries(self.config.encoders, whose="the model")
        data = self.config.data
        plan = plan_packing(shards, seq_len=data.seq_len, packing=data.packing, first_shard=len(self.shards))
        self.shards += shards
        self.shard_datasets += [",".join(prefixes)] * len(shards)
        self.shard_prefixes += [prefix for prefix, opened in zip(prefixes, by_prefix) for _ in opened]
        return plan

    def follow(self, consumption: Consumption) -> None:
        """Let steps take what `consumption` says from now on."""
        self.consumption = consumption
        self.blend = Blend(consumption.stretches(self._changes), datasets=self.datasets)

    @property
    def num_samples(self) -> int:
        """Samples of all datasets."""
        return int(self.first_sample[-1])

    def shards_of(self, dataset: int) -> list[ShardReader]:
        """Return the shards of a dataset, in their order."""
        return list(self.plans[dataset].shards)

    def describe(self) -> list[str]:
        """Return what each dataset holds and what packing it costs, for people."""
        return [
            f"{name}: {plan.num_samples} samples of {plan.seq_len} tokens an epoch, {plan.describe()}"
            for name, plan in zip(self.datasets, self.plans)
        ]

    def of_step(self, step: int) -> np.ndarray:
        """Return the samples of optimizer step `step`, counted from 0, in global order: (batch_size,) int64."""
        datasets, positions = self.blend.locate(self.consumption.positions(step))
        samples = np.empty_like(positions)
        for dataset in np.unique(datasets):
            own = datasets == dataset
            samples[own] = self.first_sample[dataset] + self.orders[dataset].samples(positions[own])
        return samples

    def epochs(self, step: int) -> dict[str, float]:
        """Return how often each dataset is read before optimizer step `step`, by its name."""
        counts = self.blend.drawn(int(self.consumption.positions(step)[0]))
        return {name: int(count) / plan.num_samples for name, count, plan in zip(self.datasets, counts, self.plans)}

    def dataset_of(self, sample: int) -> int:
        """Return which dataset a sample belongs to."""
        return int(self.first_sample.searchsorted(sample, "right")) - 1

    def pieces(self, sample: int) -> np.ndarray:
        """Return the PIECE records of one sample."""
        dataset = self.dataset_of(sample)
        return self.plans[dataset].sample(sample - int(self.first_sample[dataset]))
