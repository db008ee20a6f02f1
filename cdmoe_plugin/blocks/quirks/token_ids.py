"""A router that chooses experts by the token ids (deepseek_v4's hash layers)."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import Dispatch
from ..quirk import Quirk
from ..site import Site


class TokenIds(Quirk):
    """A block that takes the token ids beside hidden states.

    Args:
        module (`nn.Module`): The block.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @classmethod
    def find(cls, site: Site) -> Quirk | None:
        return cls(site.module) if "input_ids" in signature(type(site.module).forward).parameters else None

    def why_not_mixed(self, shared: bool) -> str | None:
        tables = [name for name, tensor in self.module.named_buffers() if not tensor.is_floating_point()]
        return f"a table of token ids chooses its experts (`{tables[0]}`)" if tables else None

    def dispatch(self, module: nn.Module, experts: nn.Module) -> Dispatch:
        return _TokenIdDispatch(module, experts)


class _TokenIdDispatch(Dispatch):
    def block(self, x: Tensor, input_ids: Tensor | None = None) -> Any:
        ids = torch.arange(x.shape[1]).expand(x.shape[:2]) if input_ids is None else input_ids
        return self.module(x, input_ids=ids.to(x.device))
