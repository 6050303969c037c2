"""What is written: a checkpoint, or a diffusers folder."""
