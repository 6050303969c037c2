"""Benchmarks of speed and quality, and the image checker that the quality benchmarks use."""
