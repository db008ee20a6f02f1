"""The three functions of the package: search a plan, apply a plan, or do both from a checkpoint."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from .autocast import without_autocast
from .blocks import model_shape
from .calibration import Calibration, calibration_for, load_calibration
from .condense.apply import note_refit, refit_record
from .condense.forms import FORMS
from .condense.refit import check_calibration, refit_layers
from .config import CondenseConfig
from .decoder.whole import searching
from .export.restrict import exportable_groups
from .loading.adapter_weights import load_adapter_weights, saved_adapter
from .loading.load import (
    check_files,
    hub_kwargs,
    load_condensed,
    load_sparse,
    open_blocks,
    opens_in_part,
    sketch_model,
)
from .model.adapters import refuse_adapters
from .plan import CondensedLayer, CondensePlan
from .search.check import check_methods, check_neurons, check_request, warn_of_disagreement
from .search.plan_search import PlanSearch
from .search.sample import refit_tokens, routed_neurons, search_sample
from .tokenizing import checkpoint_tokenizer, open_tokenizer

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


@without_autocast
def condense_pretrained(
    model: str | os.PathLike | PreTrainedModel,
    config: CondenseConfig | None = None,
    *,
    plan: CondensePlan | str | os.PathLike | None = None,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | str | os.PathLike | None = None,
    state_dir: str | os.PathLike | None = None,
    accelerator: Accelerator | PartialState | None = None,
    text_only: bool = False,
    keep_extra: bool = False,
    **model_kwargs: Any,
) -> PreTrainedModel:
    """Condense sparse layers of a Mixture-of-Experts model into dense ones (CD-MoE, arXiv 2412.00069).

    With a plan and a checkpoint, only the kept experts' weights are read, so the sparse model need not fit in memory.
    The whole model is read first if blocks are trimmed.

    Of a multimodal model, the text decoder is condensed; the rest (vision tower, projector, ...) stays as it is.

    Args:
        model (`str`, `os.PathLike` or `PreTrainedModel`): Hub name or folder of a sparse checkpoint, or a loaded model,
            which is changed in place.
        config (`CondenseConfig`, *optional*): The settings of the search; the defaults are the paper's. With a plan,
            only its fields for `refit` and calibration data are used (for a smaller budget: `CondensePlan.truncate`).
        plan (`CondensePlan` or path, *optional*): The plan to apply, without a search. Calibration data and the whole
            sparse model in memory are then only needed for a `refit`. With the folder of a condense adapter, the model
            also gets the adapter's weights.
        calibration (*optional*): None (C4, as in the paper), the name of a dataset on the hub (`name:config@split`), a
            local file or folder of .txt, .json, .jsonl, .parquet, .csv, .tsv or .arrow (also compressed), a `Dataset`,
            or a list of texts, chats, token-id lists or tensors. Chats are rendered by the tokenizer's template; a .txt
            file is cut into samples of `max_length` tokens across lines. For a multimodal model, a `Dataset` may have
            the columns that its processor makes (`input_ids`, `pixel_values`, ...), a sample in each row. A line says
            how much data is used.
        tokenizer (*optional*): A tokenizer, its name or folder, or a processor; the checkpoint's own by default. Not
            needed for token ids.
        state_dir (`str` or `os.PathLike`, *optional*): Folder for the results so far, from which an interrupted search
            resumes. Not used with a plan.
        accelerator (`Accelerator` or `PartialState`, *optional*): As in `search_plan` and `apply_plan`.
        text_only (`bool`, defaults to `False`): Whether to open only the text model in a multimodal checkpoint, if
            transformers has a class for it. The result is a text model without the rest.
        keep_extra (`bool`, defaults to `False`): Whether to carry over the checkpoint's weights for which the model has
            no place, such as layers for multi-token prediction. Otherwise the config does not declare such layers.
        **model_kwargs: Passed to `from_pretrained` (`dtype`, `device_map`, ...). With an `offload_folder` and no
            `device_map`, decoder layers stay in the checkpoint's files, condensed ones are written to that folder, and
            only one layer at a time is in memory, even while the model is saved.

    Returns:
        `PreTrainedModel`: The condensed model in eval mode; `model.condense_plan` is the applied plan.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed, or decoder layers
            that can't be dropped.
        ValueError: if config, plan or calibration do not fit; if possible before anything expensive.
    """
    adapter, plan = saved_adapter(plan, config), None if plan is None else _opened(plan)
    config = _checked(config, plan)
    refuse_adapters(model)
    if text_only:
        model_kwargs = model_kwargs | {"text_only": True}
    if isinstance(model, PreTrainedModel):
        if keep_extra:
            raise ValueError("`keep_extra` reads weights from a checkpoint: give its path instead of a loaded model.")
        loaded, data = _given(model, config, plan, calibration, tokenizer, model_kwargs)
    elif plan is not None and config.refit is None and opens_in_part(plan):
        return _noting(text_only, _with_weights(_opened_in_part(model, plan, model_kwargs, keep_extra), adapter))
    else:
        loaded, data = _opened_whole(model, config, plan, calibration, tokenizer, model_kwargs, keep_extra)
    plan = plan or search_plan(loaded, config, calibration=data, state_dir=state_dir, accelerator=accelerator)
    condensed = apply_plan(loaded, plan, config, calibration=data, accelerator=accelerator)
    return _noting(text_only, _with_weights(condensed, adapter))


@without_autocast
def search_plan(
    model: PreTrainedModel,
    config: CondenseConfig | None = None,
    *,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | str | os.PathLike | None = None,
    state_dir: str | os.PathLike | None = None,
    accelerator: Accelerator | PartialState | None = None,
) -> CondensePlan:
    """Choose experts, gates and layers on calibration data, without changing the model.

    Args:
        model (`PreTrainedModel`): A loaded sparse model.
        config (`CondenseConfig`, *optional*): The settings of the search; the defaults are the paper's.
        calibration (*optional*): As in `condense_pretrained`.
        tokenizer (*optional*): As in `condense_pretrained`; by default that of the model's checkpoint.
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
    by_size = config.target_size is not None
    groups = exportable_groups(model, blocks, config) if config.exportable is not None else None
    if not config.needs_calibration:
        named = [CondensedLayer(layer, [], []) for layer in config.layers or []]
        return CondensePlan(named, model_shape(model, blocks), config.to_dict(), form=config.form)
    data = calibration_for(model, calibration, config, tokenizer, refit_tokens(config, blocks))
    if config.refit is not None:
        # Before the search, although only the refit needs it.
        check_calibration(data, blocks, routed_neurons(config, blocks))
    with searching(model):
        # The errors of all widths need as many tokens as the refit.
        sample = data if by_size else search_sample(data, config)
        search = PlanSearch(model, config, blocks, sample, state_dir, accelerator, groups)
        if by_size:
            return search.plan_by_size()
        experts = search.experts()
        order = search.layers(experts)
        experts, order = search.spread(experts, order)
        widths = search.widths(order)
    return search.plan(experts, order, widths)


@without_autocast
def apply_plan(
    model: PreTrainedModel,
    plan: CondensePlan | str | os.PathLike,
    config: CondenseConfig | None = None,
    *,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | str | os.PathLike | None = None,
    accelerator: Accelerator | PartialState | None = None,
) -> PreTrainedModel:
    """Condense a loaded model by a plan, in place, and return it.

    The model becomes an instance of its condensed class, and `save_pretrained` writes a condensed checkpoint. With a
    plan that trims blocks, it keeps its class with fewer layers and is saved as a checkpoint of its own architecture.

    Args:
        model (`PreTrainedModel`): A loaded sparse model.
        plan (`CondensePlan` or path): The plan to apply. With the folder of a condense adapter, the model also gets the
            adapter's weights.
        config (`CondenseConfig`, *optional*): If its `refit` is set, the condensed layers are fitted to the sparse
            model on calibration data. Its other fields are part of the plan already.
        calibration (*optional*): As in `search_plan`; used for `refit` only.
        tokenizer (*optional*): As in `search_plan`; used for `refit` only.
        accelerator (`Accelerator` or `PartialState`, *optional*): Splits the calibration batches of a refit over
            processes, which must all call this function with the same arguments. All get the same weights, those of a
            single process to rounding.

    Raises:
        UnsupportedModelError: if the model is dense, has sparse layers that can't be condensed, or would have decoder
            layers that its config can't describe after blocks are trimmed.
        ValueError: if the plan was made for another model, if the model is condensed already, or if the calibration
            data can't be used. The model is then unchanged.
    """
    adapter, plan = saved_adapter(plan, config), _opened(plan)
    config = _checked(config)
    check_neurons(config, plan)
    blocks = open_blocks(model)
    plan = plan.for_model(model_shape(model, blocks))
    form = FORMS[plan.form]
    if config.refit is None:
        form.apply(model, blocks, plan)
        return _with_weights(model, adapter)
    if not form.keeps_experts:
        raise ValueError(f"`refit` is {config.refit!r}, but the plan's layers are trimmed: there is nothing to fit.")
    data = calibration_for(model, calibration, config, tokenizer, refit_tokens(config, blocks, plan))
    mlps, fits = refit_layers(model, blocks, plan.layers, config, data, accelerator)
    form.apply(model, blocks, plan, mlps)
    note_refit(model, refit_record(config, fits, data.num_tokens))
    return model


def _checked(config: CondenseConfig | None, plan: CondensePlan | None = None) -> CondenseConfig:
    if config is not None:
        check_methods(config)
        if plan is not None:
            warn_of_disagreement(config, plan)
    config = config or CondenseConfig()
    if plan is not None:
        check_neurons(config, plan)
    return config


def _opened(plan: CondensePlan | str | os.PathLike) -> CondensePlan:
    return plan if isinstance(plan, CondensePlan) else CondensePlan.load(plan)


def _with_weights(model: PreTrainedModel, adapter: Path | None) -> PreTrainedModel:
    if adapter is not None:
        load_adapter_weights(model, adapter)
    return model


def _needs_calibration(config: CondenseConfig, plan: CondensePlan | None) -> bool:
    return config.refit is not None or (plan is None and config.needs_calibration)


def _noting(text_only: bool, model: PreTrainedModel) -> PreTrainedModel:
    """Note in a condensed model's config, for its card, that it is only the text model of a multimodal one."""
    if text_only and getattr(model.config, "condense_config", None):
        model.config.condense_config["text_only"] = True
    return model


def _given(
    model: PreTrainedModel,
    config: CondenseConfig,
    plan: CondensePlan | None,
    calibration: Any,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | str | os.PathLike | None,
    model_kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, Calibration | None]:
    """Return a loaded model, with calibration data if needed."""
    if model_kwargs:
        raise ValueError(f"{sorted(model_kwargs)} only apply when a checkpoint is loaded, not to a loaded model.")
    if not _needs_calibration(config, plan):
        return model, None
    tokens = None
    if config.num_samples == "auto":
        blocks = open_blocks(model)
        check_request(plan or config, model, blocks)
        tokens = refit_tokens(config, blocks, plan)
    return model, calibration_for(model, calibration, config, tokenizer, tokens)


def _opened_in_part(
    path: str | os.PathLike, plan: CondensePlan, model_kwargs: dict[str, Any], keep_extra: bool
) -> PreTrainedModel:
    """Open a sparse checkpoint as a condensed model, without reading the experts that the plan drops."""
    _check_loading(path, model_kwargs)
    return load_condensed(path, plan, keep_extra, **model_kwargs)


def _opened_whole(
    path: str | os.PathLike,
    config: CondenseConfig,
    plan: CondensePlan | None,
    calibration: Any,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | str | os.PathLike | None,
    model_kwargs: dict[str, Any],
    keep_extra: bool,
) -> tuple[PreTrainedModel, Calibration | None]:
    """Open a whole sparse checkpoint, with calibration data if needed. Errors are raised before weights are read."""
    _check_loading(path, model_kwargs)
    sketch, blocks = sketch_model(path, model_kwargs)
    check_request(plan or config, sketch, blocks)
    if keep_extra and (plan or config).form == "trim_block":
        raise ValueError("`keep_extra` is not supported for `form` 'trim_block': decoder layers are numbered anew.")
    if plan is None and config.exportable is not None:
        exportable_groups(sketch, blocks, config)  # raises before weights are read
    check_files(path, sketch, model_kwargs, keep_extra)
    data = None
    if _needs_calibration(config, plan):
        hub = hub_kwargs(model_kwargs)
        own = partial(checkpoint_tokenizer, path, **hub)
        if tokenizer is not None:  # a revision and a subfolder are those of the checkpoint
            tokenizer = open_tokenizer(
                tokenizer, **{k: v for k, v in hub.items() if k not in ("revision", "subfolder")}
            )
        data = load_calibration(calibration, config, tokenizer, sketch.config, own, refit_tokens(config, blocks, plan))
    return load_sparse(path, sketch, model_kwargs, keep_extra), data


def _check_loading(path: object, model_kwargs: dict[str, Any]) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"`model` should be a checkpoint or a PreTrainedModel, but is a {type(path).__name__}.")
    if "adapter_kwargs" in model_kwargs:
        raise ValueError("`adapter_kwargs` is not supported: merge adapters into the weights before condensing.")
    if "output_loading_info" in model_kwargs:
        raise ValueError("`output_loading_info` is not supported: a checkpoint that lacks weights is refused.")
