"""Mixed layers: some experts stay behind the router, and dense neurons beside them make up for the others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..blocks import RoutedPart, SparseBlock, hidden_of, patched_forward
from ..model.layers_cdmoe import CondensedMLP
from ..plan import CondensedLayer
from .fold import fold_beside

# A token whose gate is smaller says next to nothing about the neurons behind it.
_LEAST_GATE = 1e-3


class MixedLayer(nn.Module):
    """The modules of a mixed layer, which replace children of the decoder layer. It is never called itself.

    Args:
        block (`SparseBlock`): The sparse block; it is not changed.
        routed (`Sequence[int]`): The experts that stay behind the router, in ascending order.
        dense (`CondensedMLP`, *optional*): The dense part. It computes the shared expert too, if there is one.
    """

    def __init__(self, block: SparseBlock, routed: Sequence[int], dense: CondensedMLP | None) -> None:
        super().__init__()
        self.part = RoutedPart(block)
        self.routed = list(routed)
        for name, module in self.part.copy(routed, dense).items():
            self.add_module(name, module)
        # A list, so that it has one name as a module.
        self._dense = [dense]

    @property
    def dense(self) -> CondensedMLP | None:
        """The dense part."""
        return self._dense[0]

    @property
    def intermediate_size(self) -> int:
        """The number of neurons that compute a token."""
        own = 0 if self.dense is None else self.dense.intermediate_size
        return own + self.part.top_k * self.part.block.intermediate_size

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the experts that stay, of their router and of the dense part, by name."""
        dense = set() if self.dense is None else set(self.dense.parameters())
        return {name: p for name, p in self.named_parameters() if name in self.part.sliced or p in dense}

    @torch.no_grad()
    def routed_output(self, x: Tensor) -> Tensor:
        """Compute the sum that the layer adds to the residual, without its dense part and before any norm.

        Args:
            x (`Tensor`): Inputs of the block, `[T, H]`.

        Returns:
            `Tensor`: float32 `[T, H]`.

        Raises:
            UnsupportedModelError: if the router has other inputs than the experts.
        """
        if self.dense is None:
            return self.sum_of_experts(x)
        with patched_forward(self.dense, lambda h, *_, **__: torch.zeros_like(h)):
            return self.sum_of_experts(x)

    def sum_of_experts(self, x: Tensor) -> Tensor:
        """Compute the sum that the layer adds to the residual, before any norm; see `routed_output`."""
        block = self.part.block
        self.part.check_inputs()
        own = getattr(self, block.path.rpartition(".")[2])
        with ExitStack() as stack:
            norms = [path for path, module in block.module.named_modules() if module is block.norm]
            for path in norms:
                stack.enter_context(patched_forward(own.get_submodule(path), lambda h: h))
            output = type(block.dispatch)(own, own).block(x[None])
        return hidden_of(output).float().view(x.shape)

    @torch.no_grad()
    def missing(self, x: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a target of the layer into one of its dense part, with the same squared errors.

        A factor `f` of the dense part's output, such as the gate per token of the shared expert in whose place it is,
        leaves `w · (f · D(x) - t)² = w · f² · (D(x) - t / f)²`.

        Args:
            x (`Tensor`): Inputs of the block, `[T, H]`.
            target (`Tensor`): Target of the sum of experts, float32 `[T, H]`.
            weights (`Tensor`): Weights of the tokens' squared errors, float32 `[T]`.

        Returns:
            The target of the dense part and the weights of its errors.
        """
        block = self.part.block
        factors = torch.full_like(weights, block.shared_scale)
        if block.shared_gate is not None:
            factors = factors * torch.sigmoid(block.shared_gate(x).float())[:, 0].clamp_min(_LEAST_GATE)
        return (target - self.routed_output(x)) / factors[:, None], weights * factors.square()


def mix(block: SparseBlock, kept: CondensedLayer, dense: CondensedMLP | None = None) -> MixedLayer:
    """Make a mixed layer with the routed experts of a plan's layer.

    Args:
        block (`SparseBlock`): The sparse block; it is not changed.
        kept (`CondensedLayer`): A layer of a plan with `routed` experts.
        dense (`CondensedMLP`, *optional*): The dense part; by default the shared and the plan's experts, folded.
    """
    dense = fold_beside(block, kept.experts, kept.gates) if dense is None else dense
    assert kept.routed is not None
    # Without neurons, a block with a shared expert still needs an MLP in its place.
    return MixedLayer(block, kept.routed, dense if dense.intermediate_size or block.shared is not None else None)
