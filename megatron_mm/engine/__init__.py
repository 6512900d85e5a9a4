"""Where a run stands: its device, its ranks, and what is replaced of torch and megatron-core for it."""
