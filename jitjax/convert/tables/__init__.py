"""Rule tables, the tensor names of the original release, and the engine that applies the rules."""
