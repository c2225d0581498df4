"""Trackers: what shows a run in other programs (Optuna's dashboard, TensorBoard, W&B, MLflow).

A tracker is fed from the store alone, while a run goes on or afterwards, and from its beginning each time. It
knows what it has, so nothing is doubled.
"""
