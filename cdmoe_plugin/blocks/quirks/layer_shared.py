"""A shared expert that is a child of the decoder layer, beside the block (granitemoeshared)."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ...model.layers_cdmoe import Omitted
from ..dispatch import patched_forward
from ..quirk import Quirk
from ..record import BlockRecord
from ..site import Site
from ..weights import read_gated_mlp


class LayerShared(Quirk):
    """A decoder layer that owns the shared expert.

    Args:
        name (`str`): Name of the shared expert in the decoder layer.
        shared (`nn.Module`): The shared expert.
    """

    def __init__(self, name: str, shared: nn.Module) -> None:
        self.name = name
        self.shared = shared
        self.spec = {"omitted": [name]}

    @classmethod
    def find(cls, site: Site) -> Quirk | None:
        # A dense MLP beside a router of the decoder layer is not a shared expert: its inputs are not the experts'.
        if site.shared is not None or "router" in site.siblings:
            return None
        found = ((name, child) for name, child in site.neighbours.items() if read_gated_mlp(child) is not None)
        name, shared = next(found, (None, None))
        return None if name is None or shared is None else cls(name, shared)

    def beside(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        return {self.name: (self.shared, Omitted())}

    def summands(self) -> tuple[nn.Module, ...]:
        return (self.shared,)

    def watch(self, record: BlockRecord, stack: ExitStack) -> None:
        handle = self.shared.register_forward_hook(lambda _module, _args, output: record.note_summand(output))
        stack.callback(handle.remove)

    def play(self, y: Tensor, stack: ExitStack) -> None:
        nothing = torch.zeros_like(y)
        stack.enter_context(patched_forward(self.shared, lambda *_, **__: nothing))
