"""The FLUX networks as Flax modules: transformer, text encoders and autoencoder."""
