"""A router and experts that are children of the decoder layer, beside a dense MLP (gemma4, diffusion_gemma)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...model.layers_cdmoe import NoRouter
from ..dispatch import Dispatch
from ..quirk import Quirk
from ..site import Site
from ..weights import UnsupportedModelError


class LayerRouter(Quirk):
    """A decoder layer that calls its router and its experts itself. The experts are the block.

    Args:
        name (`str`): Name of the router in the decoder layer.
        router (`nn.Module`): The router.
    """

    # The router's inputs are not those of the experts.
    follows_inputs = False

    def __init__(self, name: str, router: nn.Module) -> None:
        self.name = name
        self.router = router
        self.spec = {"router": name}

    @classmethod
    def experts_are_block(cls, site: Site) -> bool:
        return "router" in site.siblings

    @classmethod
    def find(cls, site: Site) -> Quirk | None:
        return cls("router", site.siblings["router"]) if cls.experts_are_block(site) else None

    def dispatch(self, module: nn.Module, experts: nn.Module) -> Dispatch:
        return _LayerDispatch(experts, self.router)

    def beside(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        return {self.name: (self.router, NoRouter())}

    def check_dropping(self, layer: int) -> None:
        raise UnsupportedModelError(
            f"The experts of decoder layer {layer} are only a part of its MLP, beside a dense one: "
            "`form='trim_layer'` can't drop the whole MLP. Use the form 'condense' or 'trim_block'."
        )


class _LayerDispatch(Dispatch):
    def __init__(self, experts: nn.Module, router: nn.Module) -> None:
        super().__init__(experts, experts)
        self.router = router

    def block(self, x: Tensor, input_ids: Tensor | None = None) -> Any:
        _, weights, chosen = self.router(x[0])
        return self.experts(x[0], chosen, weights)
