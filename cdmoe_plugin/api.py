"""The story in three verbs: search a plan, apply a plan, or both from a checkpoint."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .blocks import SparseBlock, find_sparse_blocks, model_shape
from .calibration import calibration_for, checkpoint_tokenizer, load_calibration
from .condense.apply import apply_layers, become_condensed, note_refit, refuse_condensed, refuse_quantised
from .condense.refit import check_calibration, refit_layers
from .condense.trimming.blocks import check_trimming, trim_blocks
from .config import CondenseConfig
from .decoder.stream import searching
from .loading.load import hub_kwargs, load_condensed, load_sparse, sketch_model
from .offload import unreachable
from .plan import CondensedLayer, CondensePlan
from .search.check import check_config, check_methods
from .search.layers.methods import LayerOrder
from .search.plan_search import PlanSearch
from .search.processes import Processes
from .search.spread_budget import spread_budget, uniformly
from .search.state import SearchState, fingerprint

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)


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
    """Condenses sparse layers of a Mixture-of-Experts model into dense ones (CD-MoE, arXiv 2412.00069).

    With a plan and a checkpoint, only the kept experts' weights are read, so the sparse model need not fit in memory
    (but where blocks are trimmed, the whole of it is read first).

    Args:
        model (`str`, `os.PathLike` or `PreTrainedModel`): Hub name or folder of a sparse checkpoint, or a loaded model,
            which is changed in place.
        config (`CondenseConfig`, *optional*): How to search; the defaults are the paper's. With a plan it is not
            needed; its `num_layers` and `num_experts` then do not change the plan (see `CondensePlan.truncate`), but
            its `refit` says how the condensed layers are fitted.
        plan (`CondensePlan` or path, *optional*): What to condense. No search; no calibration data without a `refit`,
            which also needs the whole sparse model in memory.
        calibration (*optional*): None (C4, as in the paper), a hub name, a local .txt/.json/.jsonl/.parquet file, a
            `Dataset`, a list of texts, or a list of token-id lists or tensors.
        tokenizer (*optional*): The checkpoint's own by default; not needed for token ids.
        state_dir (`str` or `os.PathLike`, *optional*): Folder in which the search keeps its results as they come; one
            that was interrupted goes on from there. Not used with a plan.
        accelerator (`Accelerator` or `PartialState`, *optional*): As in `search_plan`.
        **model_kwargs: Passed to `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, ...). With an
            `offload_folder` and no `device_map`, decoder layers stay in the checkpoint's files, condensed ones go to
            that folder, and one layer at a time is in memory, also as the condensed model is saved.

    Returns:
        `PreTrainedModel`: The condensed model in eval mode; `model.condense_plan` is what was applied.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed, or decoder layers
            that can't be dropped.
        ValueError: if config, plan or calibration do not fit; raised before anything expensive where that can be known.
    """
    given = config is not None
    config = CondenseConfig() if config is None else config
    check_methods(config)
    if plan is not None and not isinstance(plan, CondensePlan):
        plan = CondensePlan.load(plan)
    if "output_loading_info" in model_kwargs:
        raise ValueError("`output_loading_info` is not supported: a checkpoint that lacks weights is refused anyway.")
    if plan is not None and given:
        _warn_of_disagreement(config, plan)
    if isinstance(model, PreTrainedModel):
        if model_kwargs:
            raise ValueError(f"{sorted(model_kwargs)} only apply when a checkpoint is loaded, not to a loaded model.")
        if config.refit is not None or (plan is None and config.needs_calibration):
            calibration = calibration_for(model, calibration, config, tokenizer)
        plan = plan or search_plan(model, config, calibration=calibration, state_dir=state_dir, accelerator=accelerator)
        return apply_plan(model, plan, config, calibration=calibration)
    if not isinstance(model, (str, os.PathLike)):
        raise ValueError(f"`model` should be a checkpoint or a PreTrainedModel, but is a {type(model).__name__}.")
    if plan is not None and config.refit is None and plan.form != "trim_block":
        return load_condensed(model, plan, **model_kwargs)
    # What can be wrong with the request shows on the config alone, before weights are read.
    sketch, blocks = sketch_model(model, model_kwargs)
    _set_dtype(sketch, model_kwargs.get("dtype", model_kwargs.get("torch_dtype")))
    if plan is not None:
        plan.check_fits(model_shape(sketch, blocks))
        check_trimming(sketch, blocks, plan.form, [layer.layer for layer in plan.layers])
    else:
        check_config(config, blocks)
        check_trimming(sketch, blocks, config.form, config.layers, config.num_layers)
    data = None
    if config.refit is not None or (plan is None and config.needs_calibration):
        data = load_calibration(
            calibration,
            config,
            tokenizer,
            sketch.config,
            lambda: checkpoint_tokenizer(model, **hub_kwargs(model_kwargs)),
        )
    loaded = load_sparse(model, sketch, model_kwargs)
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
    """Chooses experts, gates and layers on calibration data; the model stays as it is.

    Args:
        model (`PreTrainedModel`): A loaded sparse model.
        config (`CondenseConfig`, *optional*): How to search; the defaults are the paper's.
        calibration (*optional*): As in `condense_pretrained`.
        tokenizer (*optional*): For texts; by default that of the checkpoint the model was loaded from.
        state_dir (`str` or `os.PathLike`, *optional*): Folder in which results are kept as they come; a search that was
            interrupted goes on from there.
        accelerator (`Accelerator` or `PartialState`, *optional*): Splits the calibration batches over the processes of
            `accelerate launch`, all of which must call this function with the same arguments. Every one of them returns
            the plan that a single process would find; the main process keeps the state.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if the config does not fit the model, if the calibration data is empty or makes fewer batches than
            there are processes, if activations are not finite, if too few experts of a layer are chosen by any token,
            or if `state_dir` belongs to another search.
    """
    config = CondenseConfig() if config is None else config
    check_methods(config)
    blocks = _open_blocks(model)
    check_config(config, blocks)
    check_trimming(model, blocks, config.form, config.layers, config.num_layers)
    if not config.needs_calibration:
        rows = [CondensedLayer(layer, [], []) for layer in config.layers or []]
        return CondensePlan(rows, model_shape(model, blocks), config.to_dict(), form=config.form)
    calibration = calibration_for(model, calibration, config, tokenizer)
    if config.refit is not None:
        check_calibration(calibration)  # before the search, of which only the last step would need more
    candidates = [b for b in blocks if config.layers is None or b.layer in config.layers]
    with searching(model):
        processes = Processes(accelerator, len(calibration.batches))
        belongs = fingerprint(model, config, calibration.fingerprint) if state_dir else {}
        state = SearchState(state_dir, belongs, {block.layer: block.num_experts for block in candidates}, processes)
        search = PlanSearch(model, config, candidates, calibration, state, processes)
        found = search.experts()
        experts = found if search.budget is None else uniformly(search.budget, found)
        chosen = search.layers(experts) if config.layers is None else LayerOrder(config.layers, [])
        scores: list[float] | None = chosen.scores or None
        alone = chosen.rounds[0] if chosen.rounds else None
        if search.budget is not None:
            experts, scores = spread_budget(search, search.budget, found, chosen.layers, scores, alone)
    rows = []
    for i, layer in enumerate(chosen.layers):
        order, gates = experts[layer]
        rows.append(
            CondensedLayer(
                layer=layer,
                experts=order.experts,
                gates=[gates[e] for e in order.experts],
                score=scores[i] if scores else None,
                expert_scores=order.scores or None,
            )
        )
    return CondensePlan(
        layers=rows,
        model=model_shape(model, blocks),
        config=config.to_dict(),
        calibration=calibration.to_dict(),
        layer_divergences=alone,
        form=config.form,
        layer_similarities=chosen.similarities,
    )


def apply_plan(
    model: PreTrainedModel,
    plan: CondensePlan | str | os.PathLike,
    config: CondenseConfig | None = None,
    *,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Condenses a loaded model as a plan says, in place, and returns it.

    The model becomes an instance of its condensed class: `save_pretrained` writes a condensed checkpoint. Only a plan
    that trims blocks leaves it what it was, with fewer layers: it is saved as a checkpoint of its own architecture.

    Args:
        model (`PreTrainedModel`): A loaded sparse model.
        plan (`CondensePlan` or path): What to condense.
        config (`CondenseConfig`, *optional*): Where its `refit` is set, the condensed layers are fitted to the sparse
            model on calibration data; all else that it says is in the plan already. Without it, they are not.
        calibration (*optional*): As in `search_plan`; used for `refit` only.
        tokenizer (*optional*): As in `search_plan`; used for `refit` only.

    Raises:
        UnsupportedModelError: if the model is dense, has sparse layers that can't be condensed, or would have decoder
            layers that its config can't describe once blocks are trimmed.
        ValueError: if the plan was made for another model, if the model is condensed already, or if the calibration
            data does not do. The model is then unchanged.
    """
    if not isinstance(plan, CondensePlan):
        plan = CondensePlan.load(plan)
    if config is not None:
        check_methods(config)
    blocks = _open_blocks(model)
    shape = model_shape(model, blocks)
    plan.check_fits(shape)
    if plan.model is None:
        plan = replace(plan, model=shape)
    mlps = None
    if config is not None and config.refit is not None:
        if plan.form != "condense":
            raise ValueError(f"`refit` is {config.refit!r}, but the plan's layers are trimmed: nothing is left to fit.")
        data = calibration_for(model, calibration, config, tokenizer)
        mlps, fits = refit_layers(model, blocks, plan.layers, config, data)
    if plan.form == "trim_block":
        trim_blocks(model, blocks, plan)
        return model
    parameters_before = model.num_parameters()
    specs = apply_layers(model, blocks, plan.layers, plan.form, mlps=mlps)
    become_condensed(model, plan, specs, len(specs) == len(blocks), parameters_before)
    if mlps is not None and config is not None:
        note_refit(model, config, fits)
    return model


def _set_dtype(sketch: nn.Module, dtype: Any) -> None:
    """Gives a model on the meta device the dtype that it will be loaded in, where `from_pretrained` is told one."""
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if isinstance(dtype, torch.dtype):
        sketch.to(dtype)


def _open_blocks(model: PreTrainedModel) -> list[SparseBlock]:
    """The sparse blocks of a loaded model whose weights can be read and computed with."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`model` should be a loaded PreTrainedModel, but is a {type(model).__name__}; of a wrapped model "
            "(PEFT, DDP), pass the one inside."
        )
    refuse_condensed(model)
    refuse_quantised(getattr(model, "hf_quantizer", None))
    blocks = find_sparse_blocks(model)
    nowhere = unreachable(model)
    if nowhere:
        raise ValueError(
            f"{len(nowhere)} weights of the model are on the meta device, such as {nowhere[0]}: load it from a "
            "checkpoint, with `device_map` and `offload_folder` if it is larger than memory."
        )
    return blocks


def _warn_of_disagreement(config: CondenseConfig, plan: CondensePlan) -> None:
    if config.form != plan.form:
        logger.warning(f"The plan decides: its form is {plan.form!r}, not the config's {config.form!r}.")
    if plan.form != "condense":
        if config.num_layers != len(plan.layers):
            logger.warning(f"The plan decides: {len(plan.layers)} layers, not the config's {config.num_layers}.")
        return
    experts = max(len(layer.experts) for layer in plan.layers)
    if config.num_experts == "auto":
        searched = plan.config or {}
        agree = all(searched.get(name) == getattr(config, name) for name in ("num_experts", "expert_budget"))
    else:
        agree = all(len(layer.experts) == config.num_experts for layer in plan.layers)
    if not agree or config.num_layers != len(plan.layers):
        logger.warning(
            f"The plan decides: {len(plan.layers)} layers with up to {experts} experts, not the config's "
            f"{config.num_layers} and {config.num_experts!r}. For fewer, use `plan.truncate`."
        )
