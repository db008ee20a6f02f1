"""A bias of the block's output (jetmoe)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..quirk import Quirk
from ..site import Site


class OutputBias(Quirk):
    """A block that adds a learned vector to its output.

    Args:
        module (`nn.Module`): The block, with a parameter `bias`.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    @classmethod
    def find(cls, site: Site) -> Quirk | None:
        return None if getattr(site.module, "bias", None) is None else cls(site.module)

    def bias(self) -> Tensor | None:
        return self.module.bias
