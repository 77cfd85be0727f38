"""``stage ablate``: grids of training runs over variants, settings and seeds, and what they say together."""
