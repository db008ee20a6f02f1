"""The three functions of the package: search a plan, apply a plan, or do both from a checkpoint."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from .blocks import model_shape
from .calibration import Calibration, calibration_for, checkpoint_tokenizer, load_calibration
from .condense.apply import note_refit
from .condense.forms import FORMS
from .condense.refit import check_calibration, refit_layers
from .config import CondenseConfig
from .decoder.stream import searching
from .loading.load import hub_kwargs, load_condensed, load_sparse, open_blocks, opens_in_part, sketch_model
from .plan import CondensedLayer, CondensePlan
from .search.check import check_methods, check_request, warn_of_disagreement
from .search.plan_search import PlanSearch

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from transformers import PreTrainedTokenizerBase


def condense_pretrained(
    model: str | os.PathLike | PreTrainedModel,
    config: CondenseConfig | None = None,
    *,
    plan: CondensePlan | str | os.PathLike | None = None,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    state_dir: str | os.PathLike | None = None,
    accelerator: Accelerator | PartialState | None = None,
    **model_kwargs: Any,
) -> PreTrainedModel:
    """Condense sparse layers of a Mixture-of-Experts model into dense ones (CD-MoE, arXiv 2412.00069).

    With a plan and a checkpoint, only the kept experts' weights are read, so the sparse model need not fit in memory.
    The whole model is read first if blocks are trimmed.

    Args:
        model (`str`, `os.PathLike` or `PreTrainedModel`): Hub name or folder of a sparse checkpoint, or a loaded model,
            which is changed in place.
        config (`CondenseConfig`, *optional*): The settings of the search; the defaults are the paper's. With a plan,
            only its fields for `refit` and calibration data are used (for a smaller budget: `CondensePlan.truncate`).
        plan (`CondensePlan` or path, *optional*): The plan to apply, without a search. Calibration data and the whole
            sparse model in memory are then only needed for a `refit`.
        calibration (*optional*): None (C4, as in the paper), a hub name, a local .txt/.json/.jsonl/.parquet file, a
            `Dataset`, a list of texts, or a list of token-id lists or tensors.
        tokenizer (*optional*): The checkpoint's own by default; not needed for token ids.
        state_dir (`str` or `os.PathLike`, *optional*): Folder for the results so far, from which an interrupted search
            resumes. Not used with a plan.
        accelerator (`Accelerator` or `PartialState`, *optional*): As in `search_plan`.
        **model_kwargs: Passed to `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, ...). With an
            `offload_folder` and no `device_map`, decoder layers stay in the checkpoint's files, condensed ones are
            written to that folder, and only one layer at a time is in memory, even while the model is saved.

    Returns:
        `PreTrainedModel`: The condensed model in eval mode; `model.condense_plan` is the applied plan.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed, or decoder layers
            that can't be dropped.
        ValueError: if config, plan or calibration do not fit; if possible before anything expensive.
    """
    plan = None if plan is None else _opened(plan)
    config = _checked(config, plan)
    if isinstance(model, PreTrainedModel):
        loaded, data = _given(model, config, plan, calibration, tokenizer, model_kwargs)
    elif plan is not None and config.refit is None and opens_in_part(plan):
        return _opened_in_part(model, plan, model_kwargs)
    else:
        loaded, data = _opened_whole(model, config, plan, calibration, tokenizer, model_kwargs)
    plan = plan or search_plan(loaded, config, calibration=data, state_dir=state_dir, accelerator=accelerator)
    return apply_plan(loaded, plan, config, calibration=data)


def search_plan(
    model: PreTrainedModel,
    config: CondenseConfig | None = None,
    *,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    state_dir: str | os.PathLike | None = None,
    accelerator: Accelerator | PartialState | None = None,
) -> CondensePlan:
    """Choose experts, gates and layers on calibration data, without changing the model.

    Args:
        model (`PreTrainedModel`): A loaded sparse model.
        config (`CondenseConfig`, *optional*): The settings of the search; the defaults are the paper's.
        calibration (*optional*): As in `condense_pretrained`.
        tokenizer (*optional*): The tokenizer for texts; by default that of the model's checkpoint.
        state_dir (`str` or `os.PathLike`, *optional*): Folder for the results so far, from which an interrupted search
            resumes.
        accelerator (`Accelerator` or `PartialState`, *optional*): Splits the calibration batches over the processes of
            `accelerate launch`, which must all call this function with the same arguments. Each returns the plan that a
            single process would find; the main process writes the state.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if the config does not fit the model, if the calibration data is empty or makes fewer batches than
            there are processes, if activations are not finite, if the tokens choose too few experts of a layer, or if
            `state_dir` belongs to another search.
    """
    config = _checked(config)
    blocks = open_blocks(model)
    check_request(config, model, blocks)
    if not config.needs_calibration:
        named = [CondensedLayer(layer, [], []) for layer in config.layers or []]
        return CondensePlan(named, model_shape(model, blocks), config.to_dict(), form=config.form)
    data = calibration_for(model, calibration, config, tokenizer)
    if config.refit is not None:
        check_calibration(data)  # before the search, although only the refit needs it
    with searching(model):
        search = PlanSearch(model, config, blocks, data, state_dir, accelerator)
        experts = search.experts()
        order = search.layers(experts)
        experts, order = search.spread(experts, order)
    return search.plan(experts, order)


def apply_plan(
    model: PreTrainedModel,
    plan: CondensePlan | str | os.PathLike,
    config: CondenseConfig | None = None,
    *,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Condense a loaded model by a plan, in place, and return it.

    The model becomes an instance of its condensed class, and `save_pretrained` writes a condensed checkpoint. With a
    plan that trims blocks, it keeps its class with fewer layers and is saved as a checkpoint of its own architecture.

    Args:
        model (`PreTrainedModel`): A loaded sparse model.
        plan (`CondensePlan` or path): The plan to apply.
        config (`CondenseConfig`, *optional*): If its `refit` is set, the condensed layers are fitted to the sparse
            model on calibration data. Its other fields are part of the plan already.
        calibration (*optional*): As in `search_plan`; used for `refit` only.
        tokenizer (*optional*): As in `search_plan`; used for `refit` only.

    Raises:
        UnsupportedModelError: if the model is dense, has sparse layers that can't be condensed, or would have decoder
            layers that its config can't describe after blocks are trimmed.
        ValueError: if the plan was made for another model, if the model is condensed already, or if the calibration
            data can't be used. The model is then unchanged.
    """
    plan = _opened(plan)
    config = _checked(config)
    blocks = open_blocks(model)
    plan = plan.for_model(model_shape(model, blocks))
    form = FORMS[plan.form]
    if config.refit is None:
        form.apply(model, blocks, plan)
        return model
    if not form.keeps_experts:
        raise ValueError(f"`refit` is {config.refit!r}, but the plan's layers are trimmed: there is nothing to fit.")
    data = calibration_for(model, calibration, config, tokenizer)
    mlps, fits = refit_layers(model, blocks, plan.layers, config, data)
    form.apply(model, blocks, plan, mlps)
    note_refit(model, config, fits)
    return model


def _checked(config: CondenseConfig | None, plan: CondensePlan | None = None) -> CondenseConfig:
    if config is None:
        return CondenseConfig()
    check_methods(config)
    if plan is not None:
        warn_of_disagreement(config, plan)
    return config


def _opened(plan: CondensePlan | str | os.PathLike) -> CondensePlan:
    return plan if isinstance(plan, CondensePlan) else CondensePlan.load(plan)


def _needs_calibration(config: CondenseConfig, plan: CondensePlan | None) -> bool:
    return config.refit is not None or (plan is None and config.needs_calibration)


def _given(
    model: PreTrainedModel,
    config: CondenseConfig,
    plan: CondensePlan | None,
    calibration: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    model_kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, Calibration | None]:
    """Return a loaded model, with calibration data if needed."""
    if model_kwargs:
        raise ValueError(f"{sorted(model_kwargs)} only apply when a checkpoint is loaded, not to a loaded model.")
    needed = _needs_calibration(config, plan)
    return model, calibration_for(model, calibration, config, tokenizer) if needed else None


def _opened_in_part(path: str | os.PathLike, plan: CondensePlan, model_kwargs: dict[str, Any]) -> PreTrainedModel:
    """Open a sparse checkpoint as a condensed model, without reading the experts that the plan drops."""
    _check_loading(path, model_kwargs)
    return load_condensed(path, plan, **model_kwargs)


def _opened_whole(
    path: str | os.PathLike,
    config: CondenseConfig,
    plan: CondensePlan | None,
    calibration: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    model_kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, Calibration | None]:
    """Open a whole sparse checkpoint, with calibration data if needed. Errors are raised before weights are read."""
    _check_loading(path, model_kwargs)
    sketch, blocks = sketch_model(path, model_kwargs)
    check_request(plan or config, sketch, blocks)
    data = None
    if _needs_calibration(config, plan):
        own = partial(checkpoint_tokenizer, path, **hub_kwargs(model_kwargs))
        data = load_calibration(calibration, config, tokenizer, sketch.config, own)
    return load_sparse(path, sketch, model_kwargs), data


def _check_loading(path: object, model_kwargs: dict[str, Any]) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"`model` should be a checkpoint or a PreTrainedModel, but is a {type(path).__name__}.")
    if "output_loading_info" in model_kwargs:
        raise ValueError("`output_loading_info` is not supported: a checkpoint that lacks weights is refused.")
