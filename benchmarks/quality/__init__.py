"""The table that judges samplers: `python -m benchmarks.quality --help`."""
