"""megatron_mm: pretraining of large multimodal decoders on megatron-core, from one CPU to 1,024 GPUs."""

from megatron_mm.noise import silence

__version__ = "0.1.0"

silence()
