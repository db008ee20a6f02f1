"""Check a request against the methods that exist and against a model."""

from __future__ import annotations

from ..blocks import SparseBlock
from ..condense.refit import check_refit
from ..config import CondenseConfig
from ..registry import lookup
from .budget import LayerBudget
from .experts.greedy import EXPERT_SELECTIONS
from .gates import GATES
from .layers.methods import LAYER_SELECTIONS
from .layers.outputs import COMPARE, MODEL_METRICS, all_metrics


def check_methods(config: CondenseConfig) -> None:
    """Checks that every method a config names is registered, and that they go together.

    Raises:
        ValueError: naming the field and the methods that exist, or the two fields that contradict each other.
    """
    if not isinstance(config, CondenseConfig):
        raise ValueError(f"`config` should be a CondenseConfig, but is a {type(config).__name__}.")
    lookup(EXPERT_SELECTIONS, config.expert_selection, "expert_selection")
    lookup(LAYER_SELECTIONS, config.layer_selection, "layer_selection")
    lookup(all_metrics(), config.metric, "metric")
    lookup(COMPARE, config.compare, "compare")
    lookup(GATES, config.gates, "gates")
    check_refit(config)
    if config.form != "condense" and config.num_experts == "auto":
        raise ValueError(f"`num_experts` is 'auto', but with `form={config.form!r}` no experts are kept.")
    if config.form != "condense" and config.refit is not None:
        raise ValueError(f"`refit` is {config.refit!r}, but with `form={config.form!r}` nothing is left to fit.")
    if config.form != "condense" and config.layer_selection == "local":
        raise ValueError(
            "`layer_selection='local'` ranks layers by what their search of experts measured, and "
            f"`form={config.form!r}` has none: choose another one of the two."
        )
    if config.layer_selection == "local" and config.metric in MODEL_METRICS:
        raise ValueError(
            f"`layer_selection='local'` compares each layer's own output, but `metric={config.metric!r}` is defined on "
            "the output of the whole model only: choose another one of the two."
        )


def check_config(config: CondenseConfig, blocks: list[SparseBlock]) -> None:
    """Checks numbers of layers and experts against a model.

    Raises:
        ValueError: naming the field, what was asked for and what there is.
    """
    sparse = [block.layer for block in blocks]
    if config.layers is not None:
        wrong = [layer for layer in config.layers if layer not in sparse]
        if wrong:
            raise ValueError(f"`layers` names {wrong}, which are no sparse decoder layers; sparse are {sparse}.")
    elif config.num_layers > len(sparse):
        raise ValueError(
            f"`num_layers` is {config.num_layers}, but the model has {len(sparse)} sparse layers: {sparse}."
        )
    budget = LayerBudget.of(config, blocks)
    if budget is not None:
        budget.check()
    number = config.num_experts
    for block in blocks:
        chosen = config.layers is None or block.layer in config.layers
        if config.form == "trim_layer" and chosen:
            block.check_dropping()
        if config.form == "condense" and chosen and number != "auto" and number > block.num_experts:
            raise ValueError(
                f"`num_experts` is {number}, but decoder layer {block.layer} has {block.num_experts} routed experts."
            )
