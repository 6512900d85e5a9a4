"""Where a run stands: its device, and its ranks.

Imported before megatron-core, which takes what accelerators it finds then.
"""

from megatron_mm.engine import device

device.keep_out_accelerators()
