"""How runs share a Ray cluster."""

from __future__ import annotations

import uuid
from typing import Any

NAMESPACE = "evomerge"
"""Of the names of workers on a cluster."""


class Share:
    """What this pool sees of others on its cluster: workers have names that say which pool they are of.

    Args:
        ray: The module, connected.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._pool = uuid.uuid4().hex[:12]

    def name_of(self, number: int) -> dict[str, str]:
        """Return the options that name a worker."""
        return {"name": f"{self._pool}-{number}", "namespace": NAMESPACE}

    def fair(self, room: int) -> int:
        """Return how many workers this pool should have.

        Args:
            room: How many the whole cluster can hold.
        """
        found = self._ray.util.list_named_actors(all_namespaces=True)
        pools = {actor["name"].partition("-")[0] for actor in found if actor["namespace"] == NAMESPACE}
        return max(1, room // len(pools | {self._pool}))
