"""The quality benchmark, which compares samplers: `python -m benchmarks.quality --help`."""
