"""Readers of the sources: diffusers folders, single files, the hub; tensors and layouts."""
