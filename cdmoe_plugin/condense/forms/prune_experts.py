"""Expert pruning: some experts stay behind the router, the others are dropped."""

from __future__ import annotations

from .condense import Condense


class PruneExperts(Condense):
    """A baseline: only the experts chosen by `routed_selection` stay. The shared expert, if any, may be refitted."""

    name = "prune_experts"
