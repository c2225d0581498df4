"""Methods that decide entry by entry from all sources at once."""

from __future__ import annotations

from evomerge.catalogue.entry import Method

ELEMENTWISE: tuple[Method, ...] = ()
