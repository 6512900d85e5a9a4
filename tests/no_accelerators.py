"""Keeps accelerators out of a process that runs tests without a GPU; imported before megatron-core is."""

from megatron_mm.engine import device

device.keep_out_accelerators()
