"""One search on one model: experts of every candidate layer, then the order of layers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import SparseBlock
from ..calibration import Calibration
from ..condense.fold import fold
from ..condense.place import standing_in
from ..config import CondenseConfig
from ..decoder.record import LayerRecorder
from ..decoder.stream import LayerStream, State
from ..model.layers_cdmoe import Trimmed
from ..plan import CondensedLayer
from ..registry import lookup
from .budget import LayerBudget
from .experts.data import ExpertOrder, SparseLayerData
from .experts.greedy import EXPERT_SELECTIONS
from .gates import GATES
from .layers.methods import LAYER_SELECTIONS, LayerOrder
from .layers.outputs import compare_outputs, layer_metric, needs_head
from .layers.variants import LayerSearchData, ModelVariants
from .processes import Processes
from .state import SearchState

logger = logging.get_logger(__name__)

# Experts in the order of their selection, and their gates.
ChosenExperts = tuple[ExpertOrder, dict[int, float]]


class PlanSearch:
    """One search on one model: the decoder layer by layer on the calibration tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: CondenseConfig,
        blocks: list[SparseBlock],
        calibration: Calibration,
        state: SearchState,
        processes: Processes,
    ) -> None:
        self.model = model
        self.config = config
        self.calibration = calibration
        self.state = state
        self.processes = processes
        self.blocks = {block.layer: block for block in blocks}
        layers_path = blocks[0].path.rsplit(".", 2)[0]
        batches = processes.mine(calibration.batches)
        self.stream = LayerStream(model, layers_path, batches)
        self.budget = LayerBudget.of(config, blocks)
        compared = config.layers is None or self.budget is not None
        if compared and needs_head(config.metric, config.compare):
            self.stream.check_head()
        self.token_weights = [
            (mask / mask.sum(1, keepdim=True) / calibration.num_samples)[mask.bool()]
            for mask in (batch.attention_mask.float() for batch in batches)
        ]

    def experts(self) -> dict[int, ChosenExperts]:
        """Order of experts and gates of every candidate layer, with inputs from the unmodified model.

        Layers that are trimmed keep no experts, and none are searched. With an expert budget, the order is longer than
        the budget pays for in every layer.
        """
        if self.config.form != "condense":
            return {layer: (ExpertOrder([], []), {}) for layer in self.blocks}
        found = {}
        states = list(self.stream.embeddings)
        for layer in logging.tqdm(range(max(self.blocks) + 1), desc="Expert search", unit="layer"):
            name = f"experts {layer}"
            if name in self.state:
                found[layer] = _order_from_dict(self.state[name])
            with self.stream.in_memory(layer):
                if layer not in self.blocks or name in self.state:
                    states = [self.stream.run_layer(layer, state, i) for i, state in enumerate(states)]
                    self.stream.check_finite()
                    continue
                found[layer], states = self._experts_of(layer, states)
            order, gates = found[layer]
            self.state[name] = {"experts": order.experts, "scores": order.scores, "gates": list(gates.values())}
            logger.info(f"Decoder layer {layer}: experts {order.experts}, divergence {order.scores[-1]:.3e}.")
        return found

    def _experts_of(self, layer: int, states: list[State]) -> tuple[ChosenExperts, list[State]]:
        data, outputs = self._observe(layer, states)
        number = self._number(data)
        select = lookup(EXPERT_SELECTIONS, self.config.expert_selection, "expert_selection")
        order = select(data, number)
        return (order, {expert: float(data.gates[expert]) for expert in order.experts}), outputs

    def layers(self, experts: dict[int, ChosenExperts]) -> LayerOrder:
        """Order of layers, and what was measured on the way."""
        select = lookup(LAYER_SELECTIONS, self.config.layer_selection, "layer_selection")
        return select(self._layer_data(experts), self.config.num_layers)

    def variants(self, experts: dict[int, ChosenExperts], name: str = "layers") -> ModelVariants:
        """The model with layers condensed to these experts; `name` tells its divergences from others on disk."""
        return ModelVariants(self._layer_data(experts, name))

    def _layer_data(self, experts: dict[int, ChosenExperts], name: str = "layers") -> LayerSearchData:
        form = self.config.form

        def mlp(layer: int) -> nn.Module:
            if form != "condense":
                return Trimmed()
            order, gates = experts[layer]
            return fold(self.blocks[layer], order.experts, [gates[e] for e in order.experts])

        def condense(layer: int) -> AbstractContextManager[None]:
            if form == "trim_block":
                return self.stream.skipping([layer])
            return standing_in(self.model, self.blocks[layer], mlp(layer))

        def entering(layer: int, state: State, batch: int) -> Tensor:
            if form == "trim_block":
                return state[0]
            # A layer without its MLP gives what would have entered that: no architecture's norms need to be known.
            with standing_in(self.model, self.blocks[layer], Trimmed()):
                return self.stream.run_layer(layer, state, batch)[0]

        return LayerSearchData(
            stream=self.stream,
            candidates=sorted(experts),
            condense=condense,
            comparison=compare_outputs(
                self.config.metric, self.config.compare, self.stream, self.token_weights, self.calibration.num_samples
            ),
            own_divergences={layer: order.scores[-1] for layer, (order, _) in experts.items() if order.scores},
            token_weights=self.token_weights,
            cache_bytes=self.config.cache_bytes,
            entering=entering,
            processes=self.processes,
            known=self.state,
            name=name,
        )

    def _observe(self, layer: int, states: list[State]) -> tuple[SparseLayerData, list[State]]:
        block = self.blocks[layer]
        recorder = LayerRecorder(self.stream, block)
        calls, outputs = [], []
        for batch, state in enumerate(states):
            call, output = recorder.record(state, batch, self.token_weights[batch])
            calls.append(call)
            outputs.append(output)
        data = SparseLayerData(
            block=block,
            calls=calls,
            gates=GATES[self.config.gates](calls, block.num_experts, self.processes),
            metric=layer_metric(self.config.metric),
            cache_bytes=self.config.cache_bytes,
            seed=self.config.seed,
            processes=self.processes,
        )
        return data, outputs

    def _number(self, data: SparseLayerData) -> int:
        """How many experts of a layer are put in order."""
        available = len(data.candidates)
        if self.budget is not None:
            return min(self.budget.depth(data.block.layer), available)
        assert isinstance(self.config.num_experts, int)
        if available < self.config.num_experts:
            raise ValueError(
                f"Decoder layer {data.block.layer}: only {available} of {data.block.num_experts} experts were chosen "
                f"by any calibration token, so {self.config.num_experts} can't be kept (an expert that no token chose "
                "has no mean gate). Use more calibration data or a smaller `num_experts`."
            )
        return self.config.num_experts


def _order_from_dict(values: Any) -> ChosenExperts:
    """A layer's experts and gates as a search state keeps them."""
    layer = CondensedLayer.from_dict(
        {"layer": 0, "experts": values["experts"], "gates": values["gates"], "expert_scores": values["scores"]},
        "search state",
    )
    return ExpertOrder(layer.experts, layer.expert_scores or []), dict(zip(layer.experts, layer.gates, strict=True))
