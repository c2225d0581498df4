"""Scoring candidates: lm-eval tasks or a callable, document splits, honest selection."""
