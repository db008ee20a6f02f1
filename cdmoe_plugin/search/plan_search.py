"""The search for a plan: the experts of every candidate layer, then the order of layers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import SparseBlock, layers_path, model_shape
from ..calibration import Calibration
from ..condense.forms import FORMS
from ..config import CondenseConfig
from ..decoder.record import LayerRecorder
from ..decoder.stream import LayerStream
from ..decoder.whole import LayerOutput
from ..plan import CondensedLayer, CondensePlan
from ..plan_files import PLAN_FILE
from ..processes import Processes
from ..registry import EXPERT_SELECTIONS, GATES, LAYER_SELECTIONS
from .budget import LayerBudget
from .experts.data import ExpertOrder, SparseLayerData
from .layers.order import LayerOrder
from .layers.outputs import compare_outputs, layer_metric, needs_head
from .layers.restricted import Groups, restricted_layers
from .layers.variants import TOKEN_LAYERS, LayerSearchData, ModelVariants
from .order import ascending
from .spread.plan import all_forms, plan_by_size
from .spread.search import CurveSearch
from .spread.staying import stay_order
from .spread.widths import condensed_only, spread_widths
from .spread_budget import ChosenExperts, spread_budget, uniformly
from .state import SearchState, fingerprint
from .staying import staying_experts

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

logger = logging.get_logger(__name__)


class PlanSearch:
    """A search for a plan on one model, which runs its decoder layer by layer on the calibration tokens.

    Args:
        model (`PreTrainedModel`): The sparse model, in eval mode (see `searching`).
        config (`CondenseConfig`): The settings of the search.
        blocks (`list[SparseBlock]`): All sparse blocks of the model.
        calibration (`Calibration`): The calibration tokens.
        state_dir (`str` or `os.PathLike`, *optional*): Folder for the results so far, to resume from.
        accelerator (`Accelerator` or `PartialState`, *optional*): Processes that share the calibration batches.
        groups (`Groups`, *optional*): The layers that may be chosen together; any by default.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: CondenseConfig,
        blocks: list[SparseBlock],
        calibration: Calibration,
        state_dir: str | os.PathLike | None = None,
        accelerator: Accelerator | PartialState | None = None,
        groups: Groups | None = None,
    ) -> None:
        self.model = model
        self.groups = groups
        self.config = config
        self.form = FORMS[config.form]
        self.shape = model_shape(model, blocks)
        self.calibration = calibration
        self.blocks = {b.layer: b for b in blocks if config.layers is None or b.layer in config.layers}
        self.processes = processes = Processes(accelerator, len(calibration.batches))
        belongs = fingerprint(model, config, calibration.fingerprint) if state_dir else {}
        sizes = {layer: block.num_experts for layer, block in self.blocks.items()}
        self.state = SearchState(state_dir, belongs, sizes, processes)
        batches = processes.mine(calibration.batches)
        # With images, computing arguments again would run the vision tower.
        memory = None if any(batch.others for batch in batches) else config.cache_bytes // 4
        self.stream = LayerStream(model, layers_path(blocks), batches, memory)
        self.budget = LayerBudget.of(config, blocks)
        compared = config.layers is None or self.budget is not None
        if compared and needs_head(config.metric, config.compare):
            self.stream.check_head()
        self.token_weights = [
            (mask / mask.sum(1, keepdim=True) / calibration.num_samples)[mask.bool()]
            for mask in (batch.attention_mask.float() for batch in batches)
        ]

    def experts(self) -> dict[int, ChosenExperts]:
        """Search the experts of every candidate layer, on inputs from the unmodified model; return them with gates.

        None are searched if the form keeps no experts. If the refit chooses single neurons, experts are not compared
        but counted: those chosen by the most tokens stand in for the neurons until then. With an expert budget, the
        orders have more experts than it allows for every layer.
        """
        if not self.form.keeps_experts:
            return {layer: (ExpertOrder([], []), {}) for layer in self.blocks}
        found = {}
        inputs = list(self.stream.embeddings)
        for layer in logging.tqdm(range(max(self.blocks) + 1), desc="Expert search", unit="layer"):
            name = f"experts {layer}"
            if name in self.state:
                found[layer] = _order_from_dict(self.state[name])
            with self.stream.in_memory(layer):
                if layer not in self.blocks or name in self.state:
                    inputs = [self.stream.run_layer(layer, entering, i) for i, entering in enumerate(inputs)]
                    self.stream.check_finite()
                    continue
                found[layer], inputs = self._experts_of(layer, inputs)
            order, gates = found[layer]
            if not order.scores:  # a single pass, not worth keeping
                continue
            kept = {"experts": order.experts, "scores": order.scores, "gates": list(gates.values())}
            self.state[name] = {**kept, "tokens": order.tokens}
            logger.info(f"Decoder layer {layer}: experts {order.experts}, divergence {order.scores[-1]:.3e}.")
        return found

    def _experts_of(self, layer: int, inputs: list[LayerOutput]) -> tuple[ChosenExperts, list[LayerOutput]]:
        data, outputs = self._observe(layer, inputs)
        number, counts = self._number(data), data.choice_counts()
        if self.config.searches_experts:
            order = EXPERT_SELECTIONS.of(self.config)(data, number)
        else:
            routed = staying_experts(data, self.config)
            others = (expert for expert in data.candidates if expert not in (routed or ()))
            most = ascending({expert: -float(counts[expert]) for expert in others})
            order = ExpertOrder(most[:number], [], routed=routed)
        order = replace(order, tokens=[int(counts[expert]) for expert in order.experts])
        return (order, {expert: float(data.gates[expert]) for expert in order.experts}), outputs

    def layers(self, experts: dict[int, ChosenExperts]) -> LayerOrder:
        """Choose layers, each with these experts; with a budget, with the first K that it allows for every layer."""
        if self.config.layers is not None:
            return LayerOrder(self.config.layers, [])
        select = LAYER_SELECTIONS.of(self.config)
        experts = experts if self.budget is None else uniformly(self.budget, experts)
        data, number = self._layer_data(experts), self.config.num_layers
        free = select(data, number)
        return free if self.groups is None else restricted_layers(data, number, self.groups, free)

    def spread(
        self, experts: dict[int, ChosenExperts], order: LayerOrder
    ) -> tuple[dict[int, ChosenExperts], LayerOrder]:
        """Spread an expert budget over the chosen layers. Without one, they keep all searched experts.

        With single neurons, all keep the same number of experts, and `widths` spreads the budget.
        """
        if self.budget is None:
            return experts, order
        if not self.config.searches_experts:
            return uniformly(self.budget, experts), order
        return spread_budget(self._variants, self.budget, experts, order)

    def widths(self, order: LayerOrder) -> dict[int, int] | None:
        """Spread an expert budget over the chosen layers as neurons; None without a budget or without neurons."""
        if self.budget is None or self.config.searches_experts:
            return None
        chosen = {layer: self.blocks[layer] for layer in order.layers}
        search = CurveSearch(
            self.stream, chosen, self.config, condensed_only(self.budget), lambda *_: [], self.state, self.processes
        )
        return spread_widths(search.curves(self.calibration), chosen, self.budget)

    def plan_by_size(self) -> CondensePlan:
        """Search what becomes of every layer for a `target_size`, and keep the plan with the state."""
        order = stay_order(self.config)
        search = CurveSearch(self.stream, self.blocks, self.config, all_forms, order, self.state, self.processes)
        curves = search.curves(self.calibration)
        return self._kept_plan(plan_by_size(self.model, curves, self.config, self.shape, self.calibration))

    def plan(
        self, experts: Mapping[int, ChosenExperts], order: LayerOrder, widths: Mapping[int, int] | None = None
    ) -> CondensePlan:
        """Make the plan of these experts, layers and numbers of neurons, and keep it with the state."""
        rows = []
        for i, layer in enumerate(order.layers):
            score, own = order.scores[i] if order.scores else None, experts[layer][0].scores or None
            width = None if widths is None else widths[layer]
            rows.append(replace(_kept(layer, experts[layer]), score=score, expert_scores=own, width=width))
        return self._kept_plan(
            CondensePlan(
                layers=rows,
                model=self.shape,
                config=self.config.to_dict() | _done(self.config),
                calibration=self.calibration.to_dict(),
                layer_divergences=order.rounds[0] if order.rounds else None,
                form=self.config.form,
                layer_similarities=order.similarities,
                restricted=order.restricted,
                token_layers=int(self.state[TOKEN_LAYERS]) if TOKEN_LAYERS in self.state else None,
            )
        )

    def _kept_plan(self, plan: CondensePlan) -> CondensePlan:
        if self.state.path is not None:
            plan.save(self.state.path.with_name(PLAN_FILE))
        return plan

    def _variants(self, experts: dict[int, ChosenExperts], name: str) -> ModelVariants:
        return ModelVariants(self._layer_data(experts, name))

    def _layer_data(self, experts: dict[int, ChosenExperts], name: str = "layers") -> LayerSearchData:
        form, stream, blocks = self.form, self.stream, self.blocks
        return LayerSearchData(
            stream=stream,
            candidates=sorted(experts),
            condense=lambda layer: form.variant(stream, blocks[layer], _kept(layer, experts[layer])),
            entering=lambda layer, state, batch: form.entering(stream, blocks[layer], state, batch),
            comparison=compare_outputs(
                self.config.metric, self.config.compare, self.stream, self.calibration.num_samples
            ),
            own_divergences={layer: order.scores[-1] for layer, (order, _) in experts.items() if order.scores},
            token_weights=self.token_weights,
            cache_bytes=self.config.cache_bytes,
            processes=self.processes,
            known=self.state,
            name=name,
            races=self.config.layer_search == "race",
            seed=self.config.seed,
        )

    def _observe(self, layer: int, inputs: list[LayerOutput]) -> tuple[SparseLayerData, list[LayerOutput]]:
        block = self.blocks[layer]
        recorder = LayerRecorder(self.stream, block)
        calls, outputs = [], []
        for batch, entering in enumerate(inputs):
            call, output = recorder.record(entering, batch, self.token_weights[batch])
            calls.append(call)
            outputs.append(output)
        data = SparseLayerData(
            block=block,
            calls=calls,
            gates=GATES.of(self.config)(calls, block.num_experts, self.processes),
            metric=layer_metric(self.config.metric),
            cache_bytes=self.config.cache_bytes,
            seed=self.config.seed,
            processes=self.processes,
        )
        return data, outputs

    def _number(self, data: SparseLayerData) -> int:
        """Return the number of experts of a layer to put in order."""
        available = len(data.candidates)
        if self.budget is not None:
            return min(self.budget.depth(data.block.layer), available)
        number = self.config.dense_experts
        assert isinstance(number, int)
        if available - self.config.num_routed < number:
            raise ValueError(
                f"`num_experts` is {self.config.num_experts}, but the calibration tokens chose only {available} of the "
                f"{data.block.num_experts} experts of decoder layer {data.block.layer}, and the others have no mean "
                "gate. Use more calibration data or a smaller `num_experts`."
            )
        return number


def _done(config: CondenseConfig) -> dict[str, Any]:
    """Return the methods of a config that the search replaces: a refit chooses neurons and adds gates per token."""
    counted = FORMS[config.form].keeps_experts and not config.searches_experts
    done = {"expert_selection": "frequency"} if counted else {}
    return done | ({"gates": "mean"} if config.gates_tokens else {})


def _kept(layer: int, chosen: ChosenExperts) -> CondensedLayer:
    order, gates = chosen
    kept = [gates[expert] for expert in order.experts]
    return CondensedLayer(layer, order.experts, kept, tokens=order.tokens, routed=order.routed)


def _order_from_dict(values: Any) -> ChosenExperts:
    """Read a layer's experts and gates from a search state."""
    row = {name: value for name, value in values.items() if name != "scores"}
    layer = CondensedLayer.from_dict({**row, "layer": 0, "expert_scores": values["scores"]}, "search state")
    order = ExpertOrder(layer.experts, layer.expert_scores or [], tokens=layer.tokens)
    return order, dict(zip(layer.experts, layer.gates, strict=True))
