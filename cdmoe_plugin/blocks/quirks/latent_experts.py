"""Experts in a smaller space, with linear layers into it and back (nemotron_h)."""

from __future__ import annotations

from torch import Tensor, nn

from ..quirk import Quirk
from ..site import Site
from ..weights import GatedWeights, read_experts


class LatentExperts(Quirk):
    """A block with linear layers around the experts, which are folded into their weights.

    Args:
        into (`nn.Linear`): The layer from hidden states to the inputs of the experts.
        back (`nn.Linear`): The layer from their outputs to hidden states.
    """

    def __init__(self, into: nn.Linear, back: nn.Linear) -> None:
        self.into = into
        self.back = back

    @classmethod
    def find(cls, site: Site) -> Quirk | None:
        features, hidden_size = read_experts(site.experts).gate.shape[-1], site.hidden_size
        into = (child for child in site.linears if child.weight.shape == (features, hidden_size))
        back = [child for child in site.linears if child.weight.shape == (hidden_size, features)]
        pairs = ((one, other) for one in into for other in back if one is not other)
        return next((cls(*pair) for pair in pairs), None)

    def hidden_size(self, features: int) -> int:
        return self.into.in_features

    def beyond_experts(self) -> tuple[nn.Module, ...]:
        return self.into, self.back

    def enter(self, x: Tensor) -> Tensor:
        return self.into(x)

    def leave(self, outputs: Tensor) -> Tensor:
        return outputs @ self.back.weight.T

    def experts_features(self, hidden_size: int) -> int:
        return self.back.in_features

    def fold(self, weights: GatedWeights, gate: float) -> tuple[GatedWeights, float]:
        return weights.between(self.into, self.back), gate

    def bias(self) -> Tensor | None:
        return self.back.bias
