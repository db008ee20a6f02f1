"""Layer selection by the similarity of a layer's input and output."""

from __future__ import annotations

from torch.nn.functional import cosine_similarity
from transformers.utils import logging

from ...decoder.whole import LayerOutput
from ...registry import LAYER_SELECTIONS
from ..order import ascending
from .order import LayerOrder
from .variants import LayerSearchData


@LAYER_SELECTIONS.register(
    "similarity",
    "highest cosine similarity of the layer's input and output",
    "He et al. 2024, arXiv 2406.15786",
)
def similar_layers(data: LayerSearchData, num_layers: int) -> LayerOrder:
    """Rank layers by the similarity of their input and output, the most similar first (He et al. 2024).

    A layer's similarity is the mean over sequences of the mean over tokens of the cosine of its input and its output
    (including the residual) in the unmodified model, in float64. Ties go to the lower index. See arXiv 2406.15786.
    """
    similarities: dict[int, float] = {}
    inputs = list(data.stream.embeddings)
    for layer in logging.tqdm(range(max(data.candidates) + 1), desc="Layer similarities", unit="layer"):
        with data.stream.in_memory(layer):
            outputs = [data.stream.run_layer(layer, given, batch) for batch, given in enumerate(inputs)]
            data.stream.check_finite()
            if layer in data.candidates:
                name = f"similarity {layer}"
                if name not in data.known:
                    data.known[name] = _similarity(data, layer, inputs, outputs)
                similarities[layer] = data.known[name]
        inputs = outputs
    order = ascending({layer: -similarity for layer, similarity in similarities.items()})[:num_layers]
    return LayerOrder(order, [], similarities=similarities)


def _similarity(data: LayerSearchData, layer: int, inputs: list[LayerOutput], outputs: list[LayerOutput]) -> float:
    parts = []
    for batch, (given, output) in enumerate(zip(inputs, outputs, strict=True)):
        leaving = output[0].flatten(2)  # a few architectures have several residual streams
        entering = data.entering(layer, given, batch).flatten(2)
        valid = data.stream.valid(batch).to(leaving.device)
        cosines = cosine_similarity(entering[valid].double(), leaving[valid].double(), dim=-1)
        parts.append(cosines @ data.token_weights[batch].to(cosines))
    return float(data.processes.total(parts))
