"""Where a run stands: its device, and its ranks."""
