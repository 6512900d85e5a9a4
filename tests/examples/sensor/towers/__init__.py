"""The encoders of readings, a file each."""
