"""A norm of the sum of shared and routed experts, inside the block (axk1)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ...model.layers_cdmoe import CondensedMLP
from ...offload import in_memory_copy
from ..quirk import Quirk
from ..record import BlockRecord
from ..site import Site


class SumNorm(Quirk):
    """A block that normalises the sum. The condensed MLP keeps the norm.

    Args:
        name (`str`): Name of the norm in the block.
        module (`nn.Module`): The norm.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.spec = {"norm": name}

    @classmethod
    def find(cls, site: Site) -> Quirk | None:
        # A child with only per-feature weights; the probe checks that it is a norm of the sum.
        size = {(site.hidden_size,)}
        found = [
            (name, child) for name, child in site.children.items() if size == {p.shape for p in child.parameters()}
        ]
        return cls(*found[0]) if len(found) == 1 else None

    def why_not_mixed(self, shared: bool) -> str | None:
        return None if shared else "it normalises the sum of its experts, and has no shared expert to widen"

    def beyond_experts(self) -> tuple[nn.Module, ...]:
        return (self.module,)

    def norm(self) -> nn.Module:
        return self.module

    def finish(self, y: Tensor) -> Any:
        return self.module(y)

    def complete(self, mlp: CondensedMLP) -> None:
        mlp.keep_norm(self.name, in_memory_copy(self.module))

    def watch(self, record: BlockRecord, stack: ExitStack) -> None:
        stack.callback(self.module.register_forward_pre_hook(lambda _, args: record.note_sum(args[0])).remove)
