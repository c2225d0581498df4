"""Tests; run with `python -m pytest` from the repository root."""
