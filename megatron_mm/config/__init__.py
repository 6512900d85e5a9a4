"""Settings: schema, presets, loading, and the rules that span several of them."""

from megatron_mm.config.load import (
    anchor,
    anchor_prefix,
    changes,
    check_own_run,
    describe_fields,
    differences,
    flat,
    load,
    load_saved,
    preset_names,
    save,
    to_yaml,
)
from megatron_mm.config.resume import check_resume
from megatron_mm.config.rules import check_start, check_world, divisors, untrained_encoders
from megatron_mm.config.schema import (
    RANDOM,
    AudioConfig,
    Config,
    ImageConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)

__all__ = [
    "RANDOM",
    "AudioConfig",
    "Config",
    "ImageConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "TrainingConfig",
    "anchor",
    "anchor_prefix",
    "changes",
    "check_own_run",
    "check_resume",
    "check_start",
    "check_world",
    "describe_fields",
    "differences",
    "divisors",
    "flat",
    "load",
    "load_saved",
    "preset_names",
    "save",
    "to_yaml",
    "untrained_encoders",
]
