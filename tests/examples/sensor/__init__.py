"""Sensor readings: a small network over windows of three channels, one token a window."""
