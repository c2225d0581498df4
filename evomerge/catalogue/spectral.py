"""Methods that work on each delta as a matrix: its singular values, its subspaces."""

from __future__ import annotations

from evomerge.catalogue.entry import Method

SPECTRAL: tuple[Method, ...] = ()
