"""Checks of a request against the existing methods and against a model."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import SparseBlock, model_shape
from ..condense.forms import FORMS
from ..condense.refit import check_refit
from ..config import CondenseConfig
from ..plan import CondensePlan
from ..registry import COMPARE, EXPERT_SELECTIONS, GATES, LAYER_SELECTIONS, METRICS, MODEL_METRICS
from .budget import LayerBudget

logger = logging.get_logger(__name__)


def check_methods(config: CondenseConfig) -> None:
    """Check that every method of a config is registered, and that they can be combined.

    Raises:
        ValueError: naming the field and the methods that exist, or the two fields that contradict each other.
    """
    if not isinstance(config, CondenseConfig):
        raise ValueError(f"`config` should be a CondenseConfig, but is a {type(config).__name__}.")
    for registry in (EXPERT_SELECTIONS, LAYER_SELECTIONS, COMPARE, GATES):
        registry.of(config)
    if config.metric not in MODEL_METRICS:
        METRICS.of(config)
    check_refit(config)
    trims = not FORMS[config.form].keeps_experts
    if trims and config.num_experts == "auto":
        raise ValueError(f"`num_experts` is 'auto', but with `form={config.form!r}` no experts are kept.")
    if trims and config.refit is not None:
        raise ValueError(f"`refit` is {config.refit!r}, but with `form={config.form!r}` there is nothing to fit.")
    if trims and config.layer_selection == "local":
        raise ValueError(
            "`layer_selection='local'` ranks layers by the divergence from their expert search, but with "
            f"`form={config.form!r}` there is none: change one of the two."
        )
    if config.layer_selection == "local" and config.metric in MODEL_METRICS:
        raise ValueError(
            f"`layer_selection='local'` compares each layer's own output, but `metric={config.metric!r}` is defined on "
            "the output of the whole model only: change one of the two."
        )


def check_request(request: CondensePlan | CondenseConfig, model: PreTrainedModel, blocks: list[SparseBlock]) -> None:
    """Check that a plan, or any plan that a search by a config may find, can be applied to a model.

    Args:
        request (`CondensePlan` or `CondenseConfig`): The plan, or the config of a search.
        model (`PreTrainedModel`): A sparse model, which may be on the meta device.
        blocks (`list[SparseBlock]`): Its sparse blocks.

    Raises:
        UnsupportedModelError: if layers can't take the form.
        ValueError: naming what does not fit.
    """
    form = FORMS[request.form]
    if isinstance(request, CondensePlan):
        request.check_fits(model_shape(model, blocks))
        form.check(model, blocks, [layer.layer for layer in request.layers])
    else:
        check_config(request, blocks)
        form.check(model, blocks, request.layers, request.num_layers)


def check_config(config: CondenseConfig, blocks: list[SparseBlock]) -> None:
    """Check a config's numbers of layers and experts against a model.

    Raises:
        ValueError: naming the field, its value and the model's.
    """
    sparse = [block.layer for block in blocks]
    if config.layers is not None:
        wrong = [layer for layer in config.layers if layer not in sparse]
        if wrong:
            raise ValueError(
                f"`layers` names {wrong}, which are not sparse decoder layers; the sparse layers are {sparse}."
            )
    elif config.num_layers > len(sparse):
        raise ValueError(
            f"`num_layers` is {config.num_layers}, but the model has {len(sparse)} sparse layers: {sparse}."
        )
    budget = LayerBudget.of(config, blocks)
    if budget is not None:
        budget.check()
    number = config.num_experts
    if number == "auto" or not FORMS[config.form].keeps_experts:
        return
    for block in blocks:
        if (config.layers is None or block.layer in config.layers) and number > block.num_experts:
            raise ValueError(
                f"`num_experts` is {number}, but decoder layer {block.layer} has {block.num_experts} routed experts."
            )


def warn_of_disagreement(config: CondenseConfig, plan: CondensePlan) -> None:
    """Warn if a config contradicts the plan that is given with it, and that overrides it."""
    if config.form != plan.form:
        logger.warning(f"The plan overrides the config: its form is {plan.form!r}, not {config.form!r}.")
    if not FORMS[plan.form].keeps_experts:
        if config.num_layers != len(plan.layers):
            logger.warning(f"The plan overrides the config: {len(plan.layers)} layers, not {config.num_layers}.")
        return
    experts = max(len(layer.experts) for layer in plan.layers)
    if config.num_experts == "auto":
        searched = plan.config or {}
        agree = all(searched.get(name) == getattr(config, name) for name in ("num_experts", "expert_budget"))
    else:
        agree = all(len(layer.experts) == config.num_experts for layer in plan.layers)
    if not agree or config.num_layers != len(plan.layers):
        logger.warning(
            f"The plan overrides the config: {len(plan.layers)} layers with up to {experts} experts, not "
            f"{config.num_layers} and {config.num_experts!r}. For fewer, use `plan.truncate`."
        )
