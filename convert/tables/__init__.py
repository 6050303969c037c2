"""Rule tables, the names of the original release, and the engine that applies them."""
