"""Writers of the targets: a checkpoint, or a diffusers folder."""
