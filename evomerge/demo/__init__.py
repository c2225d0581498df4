"""The demo: a tiny base, its experts and their tasks, made on the spot without a network."""
