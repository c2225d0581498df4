"""Tests of evomerge.merging."""
