"""Settings: schema, presets, loading, and the rules that span several of them."""

from megatron_mm.config.load import (
    anchor,
    anchor_prefix,
    changes,
    check_own_run,
    describe_fields,
    differences,
    flat,
    geometries,
    load,
    load_saved,
    preset_names,
    save,
    to_yaml,
)
from megatron_mm.config.resume import check_resume
from megatron_mm.config.rules import check_start, check_world, untrained_encoders
from megatron_mm.config.schema import (
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)

__all__ = [
    "Config",
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
    "flat",
    "geometries",
    "load",
    "load_saved",
    "preset_names",
    "save",
    "to_yaml",
    "untrained_encoders",
]
