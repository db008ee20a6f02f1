"""Checks of a request against the existing methods and against a model."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import RoutedPart, SparseBlock, layers_path, model_shape
from ..condense.forms import FORMS
from ..condense.forms.patterns import broken_patterns
from ..condense.refit import check_refit, trains_experts
from ..config import CondenseConfig
from ..plan import CondensePlan
from ..registry import (
    COMPARE,
    EXPERT_SELECTIONS,
    EXPORT_TARGETS,
    GATES,
    LAYER_SELECTIONS,
    METRICS,
    MODEL_METRICS,
    ROUTED_SELECTIONS,
)
from .budget import LayerBudget
from .spread.check import check_target

logger = logging.get_logger(__name__)


def check_methods(config: CondenseConfig) -> None:
    """Check that every method of a config is registered, and that they can be combined.

    Raises:
        ValueError: naming the field and the methods that exist, or the two fields that contradict each other.
    """
    if not isinstance(config, CondenseConfig):
        raise ValueError(f"`config` should be a CondenseConfig, but is a {type(config).__name__}.")
    for registry in (EXPERT_SELECTIONS, LAYER_SELECTIONS, ROUTED_SELECTIONS, COMPARE, GATES):
        registry.of(config)
    if config.metric not in MODEL_METRICS:
        METRICS.of(config)
    check_refit(config)
    if config.exportable is not None and config.exportable not in EXPORT_TARGETS:
        raise ValueError(
            f"`exportable` is {config.exportable!r}, but only {', '.join(map(repr, EXPORT_TARGETS))} exist."
        )
    if config.target_size is not None and (config.refit is None or config.searches_experts):
        raise ValueError(
            f"`target_size` is {config.target_size!r}, which needs a refit of single neurons: start from "
            "`CondenseConfig.best(...)` or `fast(...)` (`--preset`), or set `refit` and `refit_neurons`."
        )
    if config.target_size is not None and config.exportable not in (None, "stock"):
        raise ValueError(
            f"`exportable` is {config.exportable!r}, but with `target_size` only 'stock' is possible: some layers stay "
            "sparse."
        )
    if config.gates_tokens and (config.exportable is not None or config.target_size is not None):
        name, why = "exportable", "can't be exported"
        if config.target_size is not None:
            name, why = "target_size", "have parameters that it does not count"
        raise ValueError(
            f"`{name}` is {getattr(config, name)!r}, but layers with `gates={config.gates!r}` {why}: change one of the "
            "two."
        )
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
        form.check_layers(blocks, request.layers)
    else:
        check_config(request, blocks)
        if request.target_size is not None:
            check_target(request, model, blocks)
        form.check(model, blocks, request.layers, request.num_layers)
        if request.form == "trim_block" and request.layers is None and request.exportable is None:
            _warn_of_patterns(model, blocks)


def _warn_of_patterns(model: PreTrainedModel, blocks: list[SparseBlock]) -> None:
    """Warn before a search if the layers that it drops may break a pattern of the config."""
    total = len(model.base_model.get_submodule(layers_path(blocks)))  # type: ignore[arg-type]
    broken = {name for block in blocks for name in broken_patterns(model.config, total, [block.layer])}
    if broken:
        logger.warning_once(
            f"{' and '.join(f'`{name}`' for name in sorted(broken))} of the config give the layers a pattern, which a "
            "search may break by dropping single ones: some engines would then misread the checkpoint. "
            "`exportable='stock'` chooses whole periods."
        )


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
    elif config.target_size is None and config.num_layers > len(sparse):
        raise ValueError(
            f"`num_layers` is {config.num_layers}, but the model has {len(sparse)} sparse layers: {sparse}."
        )
    if FORMS[config.form].keeps_experts and not config.searches_experts:
        _check_without_experts(config)
    budget = LayerBudget.of(config, blocks)
    if budget is not None:
        budget.check()
    number = config.dense_experts
    _check_staying(config, blocks)
    if number == "auto" or not FORMS[config.form].keeps_experts or config.target_size is not None:
        return
    for block in blocks:
        if (config.layers is None or block.layer in config.layers) and number > block.num_experts:
            raise ValueError(
                f"`num_experts` is {number}, but decoder layer {block.layer} has {block.num_experts} routed experts."
            )


def _check_staying(config: CondenseConfig, blocks: list[SparseBlock]) -> None:
    """Check that the routers of all layers that may be chosen work with `num_routed` experts, and a refit's layers."""
    fits_shared = config.form == "prune_experts" and config.refit is not None and not trains_experts(config)
    if fits_shared and all(block.shared is None for block in blocks):
        raise ValueError(
            f"`refit` is {config.refit!r}, but with `form='prune_experts'` it fits the shared experts only, and the "
            "model has none: leave it out, or use 'distill', which trains the experts that stay."
        )
    for block in blocks if config.num_routed else ():
        if config.layers is None or block.layer in config.layers:
            part = RoutedPart(block)
            part.check_number(config.num_routed)
            if config.refit is not None:
                part.check_inputs()
            left = block.num_experts - config.num_routed
            if isinstance(config.dense_experts, int) and config.dense_experts > left:
                raise ValueError(
                    f"`num_experts` is {config.num_experts}, but with `num_routed={config.num_routed}` there are only "
                    f"{left} other experts in decoder layer {block.layer}."
                )


def _check_without_experts(config: CondenseConfig) -> None:
    """Check that a search needs no expert search, as there is none if the refit chooses neurons."""
    method = f"`refit_neurons={config.refit_neurons!r}`"
    if config.num_routed:
        method = f"`num_routed={config.num_routed}`"
    if config.layer_selection == "local":
        raise ValueError(
            f"`layer_selection='local'` ranks layers by the divergence from their expert search, but with {method} "
            "there is none: change one of the two."
        )


def check_neurons(config: CondenseConfig, plan: CondensePlan) -> None:
    """Check that a plan with numbers of neurons is fitted with single neurons.

    Raises:
        ValueError: naming the fields to set.
    """
    layers = [layer.layer for layer in plan.layers if layer.width]
    if layers and config.refit_neurons == "experts":
        raise ValueError(
            f"The plan gives decoder layers {sorted(layers)} numbers of single neurons, which a refit chooses: set "
            "`refit`, and `refit_neurons` to 'least_squares' or 'energy' (as `CondenseConfig.best()` does)."
        )


def warn_of_disagreement(config: CondenseConfig, plan: CondensePlan) -> None:
    """Warn if a config contradicts the plan that is given with it, and that overrides it."""
    if plan.spread is not None or config.target_size is not None:
        searched = (plan.config or {}).get("target_size")
        if config.target_size not in (None, searched):
            logger.warning(
                f"The plan overrides the config: its `target_size` is {searched!r}, not {config.target_size!r}. For "
                "another, use `plan.truncate`."
            )
        return
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
