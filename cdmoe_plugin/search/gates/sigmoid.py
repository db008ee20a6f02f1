"""Gates per token, which a refit adds to the layers; the plan has constant ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...decoder.record import LayerCall
from ...processes import Processes
from ...registry import GATES
from .mean import mean_gates


@GATES.register("sigmoid", "mean, and with a refit a gate per token for each expert: no plain MLP, and no exports")
def constant_part(calls: Sequence[LayerCall], num_experts: int, processes: Processes) -> Tensor:
    """Compute the constants by which gates per token are multiplied, and with which experts and layers are chosen.

    Args:
        calls (`Sequence[LayerCall]`): As for `mean_gates`.
        num_experts (`int`): Number N of routed experts of the layer.
        processes (`Processes`): All processes of the search.

    Returns:
        `Tensor`: As `mean_gates`.
    """
    return mean_gates(calls, num_experts, processes)
