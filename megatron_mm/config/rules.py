"""Rules over several settings. Each returns what is wrong and how to mend it; all failures are reported at once.

Much of what megatron-core needs is checked only in `megatron.training`'s arguments, which this package does not use:
those checks live here.
"""

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from megatron_mm.config.schema import Config
from megatron_mm.errors import ConfigError
from megatron_mm.modalities import RANDOM
from megatron_mm.settings import divisors


def _tensor_parallel(config: Config) -> Iterator[str]:
    tp = config.parallel.tp
    model = config.model
    for key, size in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
        ("model.vocab_size", model.vocab_size),
        ("data.seq_len x training.micro_batch_size / parallel.cp", config.tokens_per_micro_batch // config.parallel.cp),
    ):
        if size % tp:
            fitting = [d for d in divisors(size) if d <= 64]
            yield f"parallel.tp={tp} does not divide {key}={size}. Use tp in {fitting}."


def _query_groups(config: Config) -> Iterator[str]:
    heads, groups, tp = config.model.num_attention_heads, config.model.num_query_groups, config.parallel.tp
    if heads % groups:
        yield (
            f"model.num_query_groups={groups} does not divide model.num_attention_heads={heads}: each group "
            f"serves the same number of heads. Use one of {divisors(heads)}."
        )
    elif groups % tp and tp % groups:
        yield (
            f"model.num_query_groups={groups} and parallel.tp={tp} must divide one another: a tensor rank holds "
            f"whole groups, or a part of one. Use num_query_groups in "
            f"{[g for g in divisors(heads) if g % tp == 0 or tp % g == 0]}."
        )


def _context_parallel(config: Config) -> Iterator[str]:
    cp, num_tokens = config.parallel.cp, config.tokens_per_micro_batch
    if cp > 1 and num_tokens % (2 * cp):
        fitting = [d for d in divisors(num_tokens // 2) if d <= 64] if num_tokens % 2 == 0 else [1]
        yield (
            f"parallel.cp={cp} cuts a micro-batch into {2 * cp} chunks, which do not divide data.seq_len x "
            f"training.micro_batch_size={num_tokens}. Use cp in {fitting}."
        )


def _head_dim(config: Config) -> Iterator[str]:
    if config.model.head_dim % 2:
        yield f"model.head_dim={config.model.head_dim} is odd: rotary embedding turns pairs. Use an even number."


def _encoders(config: Config) -> Iterator[str]:
    for name, encoder in config.encoders.items():
        yield from encoder.failures(name)


def _pipeline(config: Config) -> Iterator[str]:
    parallel = config.parallel
    slots = config.model.num_layers + parallel.embedding_slot + parallel.loss_slot
    extra = " + ".join(
        name for name, on in (("embedding", parallel.embedding_slot), ("loss", parallel.loss_slot)) if on
    )
    if parallel.vpp > 1 and parallel.pp == 1:
        yield f"parallel.vpp={parallel.vpp} needs more than one pipeline stage. Use vpp=1 or pp>1."
    if parallel.stage_layers is not None:
        yield from _stage_layers(config)
        return
    if slots % (parallel.pp * parallel.vpp):
        yield (
            f"parallel.pp={parallel.pp} x vpp={parallel.vpp} does not divide the {slots} slots (model.num_layers="
            f"{config.model.num_layers}{' + ' + extra if extra else ''}). Use pp x vpp in {divisors(slots)}, or set "
            "parallel.embedding_slot / parallel.loss_slot."
        )


def _stage_layers(config: Config) -> Iterator[str]:
    parallel, counts = config.parallel, config.parallel.stage_layers
    if len(counts) != parallel.pp * parallel.vpp:
        yield (
            f"parallel.stage_layers has {len(counts)} numbers, parallel.pp={parallel.pp} x vpp={parallel.vpp} makes "
            f"{parallel.pp * parallel.vpp} model chunks. Give each its number of layers."
        )
    if sum(counts) != config.model.num_layers:
        yield (
            f"parallel.stage_layers sums to {sum(counts)} layers, model.num_layers={config.model.num_layers}. Let them "
            "agree."
        )
    if parallel.embedding_slot or parallel.loss_slot:
        yield (
            "parallel.stage_layers says where each layer is, so no slot is counted. Set parallel.embedding_slot=false "
            "parallel.loss_slot=false with it."
        )


def _overlap(config: Config) -> Iterator[str]:
    if config.parallel.tp_comm_overlap and config.parallel.tp == 1:
        yield "parallel.tp_comm_overlap=true overlaps communication of tensor ranks, and parallel.tp=1. Unset it."
    if config.parallel.tp_comm_overlap and config.training.backend == "local":
        yield (
            "parallel.tp_comm_overlap=true is TransformerEngine's, and training.backend=local. Use "
            "training.backend=transformer_engine, or unset it."
        )
    if config.parallel.overlap_param_gather and not config.parallel.overlap_grad_reduce:
        yield "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true in megatron-core. Set both."


def _fp8(config: Config) -> Iterator[str]:
    training, parallel, model = config.training, config.parallel, config.model
    if training.precision != "fp8":
        return
    if training.backend == "local":
        yield (
            "training.precision=fp8 is TransformerEngine's, and training.backend=local. Use "
            "training.backend=transformer_engine, or training.precision=bf16."
        )
    if training.fp8_recipe == "delayed" and training.bf16_end_layers:
        yield (
            f"training.bf16_end_layers={training.bf16_end_layers} is refused by megatron-core with "
            "training.fp8_recipe=delayed. Use training.bf16_end_layers=0, or training.fp8_recipe=current."
        )
    if 2 * training.bf16_end_layers >= model.num_layers:
        yield (
            f"training.bf16_end_layers={training.bf16_end_layers} at each end leaves none of model.num_layers="
            f"{model.num_layers} to training.precision=fp8. Use fewer, or training.precision=bf16."
        )
    multiple = 128 if training.fp8_recipe == "blockwise" else 16
    own_tokens = config.tokens_per_micro_batch // (parallel.cp * parallel.tp)
    for what, size in (
        ("model.hidden_size", model.hidden_size),
        ("model.num_attention_heads x model.head_dim / parallel.tp", _query_size(config)),
        ("2 x model.num_query_groups x model.head_dim / parallel.tp", _key_value_size(config)),
        ("model.ffn_hidden_size / parallel.tp", model.ffn_hidden_size // parallel.tp),
        ("data.seq_len x training.micro_batch_size / (parallel.cp x parallel.tp)", own_tokens),
    ):
        if size % multiple:
            yield (
                f"{what}={size} is not a multiple of {multiple}, which FP8 matrix products with "
                f"training.fp8_recipe={training.fp8_recipe} need. Change it, or use training.precision=bf16."
            )


def _query_size(config: Config) -> int:
    return config.model.num_attention_heads * config.model.head_dim // config.parallel.tp


def _key_value_size(config: Config) -> int:
    """Return the rows of the key/value weight on one tensor rank: sharded where there are enough groups."""
    groups, tp = config.model.num_query_groups, config.parallel.tp
    return 2 * (groups // tp if groups % tp == 0 else groups) * config.model.head_dim


def _schedule(config: Config) -> Iterator[str]:
    if config.schedule.warmup_steps >= config.decay_steps:
        yield (
            f"schedule.warmup_steps={config.schedule.warmup_steps} leaves nothing of the {config.decay_steps} steps of "
            "the schedule to decay over. Use fewer."
        )
    if config.optimizer.min_lr > config.optimizer.lr and config.schedule.style != "constant":
        yield (
            f"optimizer.min_lr={config.optimizer.min_lr} is above optimizer.lr={config.optimizer.lr}. Use a smaller "
            "optimizer.min_lr."
        )


def _blend(config: Config) -> Iterator[str]:
    for where, names in (
        ("data.train", config.data.train),
        *((f"data.changes from step {change.from_step}", change.train) for change in config.data.changes),
    ):
        if not names or not all(prefix for name in names for prefix in name.split(",")):
            yield f"{where} is {names!r}, which names no shards. Write [prefix, ...], or {{prefix: weight, ...}}."
    steps = [change.from_step for change in config.data.changes]
    if steps != sorted(set(steps)):
        yield f"data.changes begin at steps {steps}. Put them in ascending order, one a step."


def _without_effect(config: Config) -> Iterator[str]:
    """Name what was asked for, in place of its default, and would not happen: a setting is honoured or refused."""
    training, guard = config.training, config.guard
    fp8, style = training.precision == "fp8", config.schedule.style
    for needed, met, keys in (
        ("training.precision=fp8", fp8, ("training.fp8_recipe", "training.bf16_end_layers")),
        ("optimizer.weight_decay above 0", config.optimizer.weight_decay > 0, ("optimizer.decay_embeddings",)),
        ("a schedule.style that decays", style != "constant", ("optimizer.min_lr",)),
        ("schedule.style=cosine or linear", style in ("cosine", "linear"), ("schedule.decay_steps",)),
        ("data.prefetch_steps above 0", config.data.prefetch_steps > 0, ("data.stall_seconds",)),
        ("guard.spike_window above 0", guard.spike_window > 0, ("guard.spike_deviations", "guard.spike_steps")),
        ("guard.spike_window above 0", guard.spike_window > 0, ("guard.spike_nats",)),
        ("guard.slow_rank_interval above 0", guard.slow_rank_interval > 0, ("guard.slow_rank_ratio",)),
    ):
        for key in keys if not met else ():
            section, name = key.split(".")
            value, default = (getattr(part, name) for part in (getattr(config, section), _defaults(config, section)))
            if value != default:
                shown = "null" if default is None else str(default).lower()
                yield f"{key}={value} has no effect without {needed}. Set that, or {key}={shown}."


def _defaults(config: Config, section: str) -> Any:
    """Return the defaults of a section as attributes."""
    fields = type(getattr(config, section)).model_fields
    return SimpleNamespace(**{name: field.default for name, field in fields.items()})


def _guard(config: Config) -> Iterator[str]:
    if config.guard.spike_window == 1:
        yield (
            "guard.spike_window=1 keeps one loss, which says nothing about how much losses differ: no spike would ever "
            "be found. Use 2 or more, or 0 to look for none."
        )

    retried, hang = 60 * config.guard.retry_minutes, config.guard.hang_seconds
    if hang and retried >= hang:
        yield (
            f"guard.retry_minutes={config.guard.retry_minutes:g} tries storage again for {retried:g} s, and "
            f"guard.hang_seconds={hang:g} takes such a rank for hung before. Use guard.retry_minutes="
            f"{hang / 90:.2g} or less, or a longer guard.hang_seconds."
        )


def _never_comes(config: Config) -> Iterator[str]:
    """Name what would come at a step that the run never reaches, or from data that it has not."""
    training, checkpoint = config.training, config.checkpoint
    if training.stop_after and training.stop_after > training.steps:
        yield (
            f"training.stop_after={training.stop_after} is behind the last step, training.steps={training.steps}. Use "
            "a step before it, or null."
        )
    late = [change.from_step for change in config.data.changes if change.from_step >= training.steps]
    if late:
        yield (
            f"data.changes begin at steps {late}, and the last step is {training.steps - 1}, counted from 0. Take them "
            "out, or raise training.steps."
        )
    if checkpoint.interval and checkpoint.keep_every % checkpoint.interval:
        yield (
            f"checkpoint.keep_every={checkpoint.keep_every} is no multiple of checkpoint.interval="
            f"{checkpoint.interval}: most of the steps that it divides are never saved. Use a multiple."
        )
    if checkpoint.memory_interval and not 0 < checkpoint.memory_interval < checkpoint.interval:
        yield (
            f"checkpoint.memory_interval={checkpoint.memory_interval} is not below checkpoint.interval="
            f"{checkpoint.interval}: copies in memory are newer than a checkpoint on disk, never instead of one. Use a "
            "smaller one, or 0 for none."
        )


def _paths(config: Config) -> Iterator[str]:
    """Name paths as a shell would have had to expand them: here they would be folders called `~` and `$HOME`."""
    start_from = config.training.start_from
    for key, paths in (
        ("run_dir", [config.run_dir]),
        ("data.train", [prefix for name in config.data.train_datasets for prefix in name.split(",")]),
        ("data.validation", config.data.validation),
        ("training.start_from", [start_from] if start_from else []),
        *((f"{name}.pretrained", [own.pretrained] if own.pretrained else []) for name, own in config.encoders.items()),
    ):
        for path in paths:
            if path.strip().startswith("~") or re.search(r"\$[A-Za-z_{]", path):
                yield f"{key}={path}: ~ and $ are expanded by the shell, not here. Write the path out."
            elif key == "run_dir" and not path.strip():
                yield f"{key}={path!r} is no folder. Name one."


RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
    _tensor_parallel,
    _query_groups,
    _context_parallel,
    _head_dim,
    _encoders,
    _pipeline,
    _overlap,
    _fp8,
    _schedule,
    _blend,
    _paths,
    _without_effect,
    _guard,
    _never_comes,
)


def failures(config: Config) -> list[str]:
    """Return what is wrong with `config` on any number of ranks; empty if nothing is."""
    return [failure for rule in RULES for failure in rule(config)]


def world_failures(config: Config, world_size: int) -> list[str]:
    """Return what is wrong with running `config` on `world_size` ranks; empty if nothing is."""
    parallel, training = config.parallel, config.training
    if world_size < 1 or world_size % parallel.ranks_per_replica:
        return [
            f"{world_size} ranks cannot be cut into replicas of parallel.tp={parallel.tp} x cp={parallel.cp} x "
            f"pp={parallel.pp} = {parallel.ranks_per_replica} ranks. Launch a positive multiple of that, or "
            "change the layout."
        ]
    found = []
    dp_size = world_size // parallel.ranks_per_replica
    if training.global_batch_size % (training.micro_batch_size * dp_size):
        found.append(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of training.micro_batch_size="
            f"{training.micro_batch_size} x dp={dp_size} (dp = {world_size} ranks / (tp={parallel.tp} x "
            f"cp={parallel.cp} x pp={parallel.pp}))."
        )
    elif parallel.vpp > 1 and config.num_micro_batches(dp_size) % parallel.pp:
        found.append(
            f"parallel.vpp={parallel.vpp} needs the {config.num_micro_batches(dp_size)} micro-batches of a step to be "
            f"a multiple of parallel.pp={parallel.pp}. Change training.global_batch_size, or use vpp=1."
        )
    return found


def check_world(config: Config, world_size: int) -> None:
    """Pass if `config` can run on `world_size` ranks; raise ConfigError with every reason otherwise."""
    found = world_failures(config, world_size)
    if found:
        raise ConfigError("\n  ".join(found))


def start_failures(config: Config) -> list[str]:
    """Return what `config` lacks to start a run or to go on with one; empty if nothing.

    A configuration that is only described, rehearsed, planned or exported needs none of it.
    """
    if config.training.start_from:
        return []
    return [
        f"{name}.pretrained is not given, and training.start_from names no checkpoint to take the encoder from. Give "
        f"{name}.pretrained=FILE, or training.start_from=CHECKPOINT; {name}.pretrained=random trains an encoder from "
        "random weights."
        for name, encoder in config.encoders.items()
        if encoder.pretrained is None
    ]


def untrained_encoders(config: Config) -> list[str]:
    """Return which of the encoders a run of `config` keeps at random weights, as runs could before
    `pretrained` had to be given."""
    if config.training.start_from:
        return []
    encoders = config.encoders.items()
    return [name for name, own in encoders if not own.trainable and own.pretrained in (None, RANDOM)]


def check_start(config: Config) -> None:
    """Pass if a run of `config` can start, or go on; raise ConfigError with every reason otherwise."""
    found = start_failures(config)
    if found:
        raise ConfigError("\n  ".join(found))
