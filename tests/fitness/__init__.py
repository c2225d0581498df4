"""Tests of evomerge.fitness."""
