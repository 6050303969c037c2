"""Tables of speed and quality, and the picture checker they rest on."""
