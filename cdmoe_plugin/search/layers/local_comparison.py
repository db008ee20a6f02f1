"""Layer selection by what condensing does to a layer's own output."""

from __future__ import annotations

from ...registry import LAYER_SELECTIONS
from ..order import ascending
from .order import LayerOrder, scores_along
from .variants import LayerSearchData, ModelVariants


@LAYER_SELECTIONS.register("local", "least change of the layer's own output", "CD-MoE, section 4.4")
def local_layers(data: LayerSearchData, num_layers: int) -> LayerOrder:
    """Layers whose own output changes least first ("Local Layer Comparison" in CD-MoE, section 4.4).

    A layer's own divergence is the last one that the expert search measured for it, with all K experts kept; what
    `compare` says does not matter for it. Ranked once, ties to the lower index.
    """
    layers = ascending({layer: data.own_divergences[layer] for layer in data.candidates})[:num_layers]
    return LayerOrder(layers, scores_along(ModelVariants(data), layers))
