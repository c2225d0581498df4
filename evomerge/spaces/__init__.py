"""What may vary in a run, and how a genome becomes a recipe."""
