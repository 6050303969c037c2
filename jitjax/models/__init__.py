"""The FLUX networks as Flax modules."""
