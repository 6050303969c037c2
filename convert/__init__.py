"""Conversion of PyTorch checkpoints: rule tables, their engine, and `python -m jitjax.convert`."""
