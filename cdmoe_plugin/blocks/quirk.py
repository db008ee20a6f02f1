"""The differences between sparse blocks: everything in which one may depart from the common form."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..model.layers_cdmoe import CondensedMLP
from .dispatch import Dispatch, RoutedCall
from .record import BlockRecord
from .site import Site
from .weights import GatedWeights


class Quirk:
    """A way in which the sparse blocks of some architectures depart from the common form.

    A quirk is one module in `quirks/` with one subclass, found there by itself, which overrides what differs; every
    method here does what is right for the common form. A block may have several quirks, whose methods are then called
    one after the other.
    """

    # Whether the output of the block follows from its inputs (and token ids) alone.
    follows_inputs = True
    # Entries of `condensed_layers` in a condensed model's config.json, by which its layers are built again.
    spec: Mapping[str, Any] = {}

    # --- recognised by structure ---

    @classmethod
    def find(cls, site: Site) -> Quirk | None:
        """Recognise the quirk at a place with stacked expert weights; None if it is not there."""
        return None

    @classmethod
    def experts_are_block(cls, site: Site) -> bool:
        """Whether the module with the expert weights is the whole block, a child of the decoder layer."""
        return False

    @classmethod
    def of_output(cls, output: Any, call: RoutedCall) -> Quirk | None:
        """Recognise the quirk by the output of a block, which the model has to compute for it."""
        return None

    def dispatch(self, module: nn.Module, experts: nn.Module) -> Dispatch | None:
        """Make the adapter to how the block calls its experts; None if it does so in the common form."""
        return None

    # --- the decoder layer around the block ---

    def beside(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        """Other children of the decoder layer that belong to the block: name to (module, its condensed form)."""
        return {}

    def summands(self) -> tuple[nn.Module, ...]:
        """Those of them whose output the decoder layer adds to that of the block."""
        return ()

    def check_dropping(self, layer: int) -> None:
        """Check that dropping the block drops the whole MLP of its decoder layer.

        Raises:
            UnsupportedModelError: if it does not.
        """

    # --- computing ---

    def hidden_size(self, features: int) -> int:
        """The size of hidden states for experts that take `features`."""
        return features

    def enter(self, x: Tensor) -> Tensor:
        """Map hidden states `[..., H]` to the inputs of the experts."""
        return x

    def leave(self, outputs: Tensor) -> Tensor:
        """Map outputs of the experts to hidden states `[..., H]`, without a bias."""
        return outputs

    def experts_features(self, hidden_size: int) -> int:
        """The size of what the experts give."""
        return hidden_size

    def split_gates(self, gates: Tensor) -> tuple[Tensor | None, Tensor]:
        """Split router weights into factors of the experts' inputs (None for 1) and factors of their outputs."""
        return None, gates

    def fold(self, weights: GatedWeights, gate: float) -> tuple[GatedWeights, float]:
        """Fold into one expert's weights what can be; the factor that is left belongs to its output."""
        return weights, gate

    def bias(self) -> Tensor | None:
        """The vector `[H]` that the block adds to its output for every token."""
        return None

    def finish(self, y: Tensor) -> Any:
        """Turn the sum of shared and routed experts into the output of the block."""
        return y

    def norm(self) -> nn.Module | None:
        """The module that the block applies to the sum, if there is one."""
        return None

    def complete(self, mlp: CondensedMLP) -> None:
        """Give a condensed MLP what the block does beside its experts."""

    # --- watching and playing back ---

    def watch(self, record: BlockRecord, stack: ExitStack) -> None:
        """Record what the block's own input and output do not show, until the stack closes."""

    def play(self, y: Tensor, stack: ExitStack) -> None:
        """Make the rest of the decoder layer work with `y` `[B, S, H]` in place of the sum, until the stack closes."""
