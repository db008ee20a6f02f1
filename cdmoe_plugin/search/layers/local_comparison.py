"""Layer selection by the change of a layer's own output."""

from __future__ import annotations

from ...registry import LAYER_SELECTIONS
from ..order import ascending
from .order import LayerOrder, scores_along
from .variants import LayerSearchData, ModelVariants


@LAYER_SELECTIONS.register("local", "least change of the layer's own output", "CD-MoE, section 4.4")
def local_layers(data: LayerSearchData, num_layers: int) -> LayerOrder:
    """Rank layers by the change of their own output, the least first ("Local Layer Comparison" in CD-MoE, section 4.4).

    A layer's own divergence is that of its expert search with all K experts kept, independently of `compare`. Ties go
    to the lower index.
    """
    layers = ascending({layer: data.own_divergences[layer] for layer in data.candidates})[:num_layers]
    return LayerOrder(layers, scores_along(ModelVariants(data), layers))
