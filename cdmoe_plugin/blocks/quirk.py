"""The base class of quirks: departures of sparse blocks from the common form."""

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
    """A departure of some architectures' sparse blocks from the common form.

    A quirk is one module in `quirks/` with one subclass, which is discovered automatically and overrides the methods
    that differ; the methods here are those of the common form. The quirks of one block are applied one after the other.
    """

    # Whether the block's output depends only on its inputs and the token ids.
    follows_inputs = True
    # Entries of `condensed_layers` in config.json that building a condensed layer needs.
    spec: Mapping[str, Any] = {}

    # --- recognised by structure ---

    @classmethod
    def find(cls, site: Site) -> Quirk | None:
        """Recognise the quirk at a place with stacked expert weights; return None if it does not apply."""
        return None

    @classmethod
    def experts_are_block(cls, site: Site) -> bool:
        """Return whether the module with the expert weights is the whole block, a child of the decoder layer."""
        return False

    @classmethod
    def of_output(cls, output: Any, call: RoutedCall) -> Quirk | None:
        """Recognise the quirk by the output of the block; return None if it does not apply."""
        return None

    def dispatch(self, module: nn.Module, experts: nn.Module) -> Dispatch | None:
        """Make an adapter to the block's call of its experts; return None for the common call."""
        return None

    # --- the decoder layer around the block ---

    def beside(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        """Map names of other children of the decoder layer that belong to the block to (module, its condensed form)."""
        return {}

    def summands(self) -> tuple[nn.Module, ...]:
        """Return those of them whose output the decoder layer adds to that of the block."""
        return ()

    def check_dropping(self, layer: int) -> None:
        """Check that dropping the block drops the whole MLP of its decoder layer.

        Raises:
            UnsupportedModelError: if it does not.
        """

    # --- fewer experts behind the router ---

    def why_not_mixed(self, shared: bool) -> str | None:
        """Return why some experts can't stay behind the router, with or without a shared expert; None if they can."""
        return None

    def beyond_experts(self) -> tuple[nn.Module, ...]:
        """Return modules in the block whose weights belong to no single expert, whatever their sizes."""
        return ()

    # --- computing ---

    def hidden_size(self, features: int) -> int:
        """Return the size of hidden states if the experts' inputs have `features`."""
        return features

    def enter(self, x: Tensor) -> Tensor:
        """Map hidden states `[..., H]` to the inputs of the experts."""
        return x

    def leave(self, outputs: Tensor) -> Tensor:
        """Map outputs of the experts to hidden states `[..., H]`, without a bias."""
        return outputs

    def experts_features(self, hidden_size: int) -> int:
        """Return the size of the experts' outputs."""
        return hidden_size

    def split_gates(self, gates: Tensor) -> tuple[Tensor | None, Tensor]:
        """Split router weights into factors of the experts' inputs (None for 1) and factors of their outputs."""
        return None, gates

    def fold(self, weights: GatedWeights, gate: float) -> tuple[GatedWeights, float]:
        """Fold the quirk into one expert's weights, and return the remaining factor of its output."""
        return weights, gate

    def bias(self) -> Tensor | None:
        """Return the bias `[H]` of the block's output, if any."""
        return None

    def finish(self, y: Tensor) -> Any:
        """Turn the sum of shared and routed experts into the output of the block."""
        return y

    def norm(self) -> nn.Module | None:
        """Return the norm that the block applies to the sum, if any."""
        return None

    def complete(self, mlp: CondensedMLP) -> None:
        """Add the other parts of the block to a condensed MLP."""

    # --- recording and replaying ---

    def watch(self, record: BlockRecord, stack: ExitStack) -> None:
        """Record values that are not in the block's own input and output, until the stack closes."""

    def play(self, y: Tensor, stack: ExitStack) -> None:
        """Make the rest of the decoder layer use `y` `[B, S, H]` in place of the sum, until the stack closes."""
