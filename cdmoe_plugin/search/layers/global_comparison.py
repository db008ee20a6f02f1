"""Layer selection by the change of the model's output when a layer alone is condensed."""

from __future__ import annotations

from ...registry import LAYER_SELECTIONS
from ..order import ascending
from .order import LayerOrder, scores_alone, scores_along
from .variants import LayerSearchData, ModelVariants


@LAYER_SELECTIONS.register(
    "global", "least change of the model's output by condensing the layer alone", "CD-MoE, section 4.4"
)
def global_layers(data: LayerSearchData, num_layers: int) -> LayerOrder:
    """Rank layers by the change of the model's output when each is condensed alone, the least first.

    "Global Layer Comparison" in CD-MoE, section 4.4. Ties go to the lower index.
    """
    model = ModelVariants(data)
    alone = scores_alone(model, data.candidates)
    layers = ascending(alone)[:num_layers]
    return LayerOrder(layers, scores_along(model, layers), [alone])
