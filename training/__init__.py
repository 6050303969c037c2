"""Training of the bundled tiny FLUX checkpoint in PyTorch; not part of the installed package."""
