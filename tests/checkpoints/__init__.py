"""Tests of evomerge.checkpoints, and tiny checkpoints for other tests (`tiny.py`)."""
