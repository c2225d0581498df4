"""Building merged models: recipe and checkpoints in, a resident model or files out."""
