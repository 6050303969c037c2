"""How the bundled tiny FLUX checkpoint was made (PyTorch; not part of the installed package)."""
