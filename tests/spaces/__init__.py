"""Tests of evomerge.spaces."""
