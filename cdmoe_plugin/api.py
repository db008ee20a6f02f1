"""The story in three verbs: search a plan, apply a plan, or both from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .calibration import Calibration, load_calibration, needs_tokenizer
from .condensed import apply_layers, become_condensed, fold, refuse_condensed, standing_in
from .config import CondenseConfig
from .divergence import METRICS
from .layerwise import LayerRecorder, LayerStream, State, searching
from .loading import hub_kwargs, load_condensed, sketch_model
from .plan import CondensedLayer, CondensePlan
from .selection import lookup
from .selection.experts import EXPERT_SELECTIONS, ExpertOrder, SparseLayerData
from .selection.gates import GATES
from .selection.layers import COMPARE, LAYER_SELECTIONS, LayerSearchData
from .sparse import SparseBlock, check_config, find_sparse_blocks, model_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

REFITS: dict[str | None, Any] = {None: None}


def condense_pretrained(
    model: str | os.PathLike | PreTrainedModel,
    config: CondenseConfig | None = None,
    *,
    plan: CondensePlan | str | os.PathLike | None = None,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **model_kwargs: Any,
) -> PreTrainedModel:
    """Condenses sparse layers of a Mixture-of-Experts model into dense ones (CD-MoE, arXiv 2412.00069).

    With a plan and a checkpoint, only the kept experts' weights are read, so the sparse model need not fit in memory.

    Args:
        model (`str`, `os.PathLike` or `PreTrainedModel`): Hub name or folder of a sparse checkpoint, or a loaded model,
            which is changed in place.
        config (`CondenseConfig`, *optional*): How to search; the defaults are the paper's. With a plan it is not
            needed; its `num_layers` and `num_experts` then do not change the plan (see `CondensePlan.truncate`).
        plan (`CondensePlan` or path, *optional*): What to condense. No search, no calibration data.
        calibration (*optional*): None (C4, as in the paper), a hub name, a local .txt/.json/.jsonl/.parquet file, a
            `Dataset`, a list of texts, or a list of token-id lists or tensors.
        tokenizer (*optional*): The checkpoint's own by default; not needed for token ids.
        **model_kwargs: Passed to `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, ...).

    Returns:
        `PreTrainedModel`: The condensed model in eval mode; `model.condense_plan` is what was applied.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if config, plan or calibration do not fit; raised before anything expensive where that can be known.
    """
    given = config is not None
    config = config or CondenseConfig()
    check_methods(config)
    if plan is not None and not isinstance(plan, CondensePlan):
        plan = CondensePlan.load(plan)
    if plan is not None and given:
        _warn_of_disagreement(config, plan)
    if isinstance(model, PreTrainedModel):
        if model_kwargs:
            raise ValueError(f"{sorted(model_kwargs)} only apply when a checkpoint is loaded, not to a loaded model.")
        plan = plan or search_plan(model, config, calibration=calibration, tokenizer=tokenizer)
        return apply_plan(model, plan)
    if not isinstance(model, (str, os.PathLike)):
        raise ValueError(f"`model` should be a checkpoint or a PreTrainedModel, but is a {type(model).__name__}.")
    if plan is not None:
        return load_condensed(model, plan, **model_kwargs)
    # What can be wrong with the request shows on the config alone, before weights are read.
    sketch = sketch_model(model, model_kwargs)
    refuse_condensed(sketch)
    check_config(config, find_sparse_blocks(sketch))
    if tokenizer is None and needs_tokenizer(calibration):
        tokenizer = AutoTokenizer.from_pretrained(model, **hub_kwargs(model_kwargs))
    data = load_calibration(calibration, config, tokenizer, sketch.config)
    loaded = AutoModelForCausalLM.from_pretrained(model, **model_kwargs)
    return apply_plan(loaded, search_plan(loaded, config, calibration=data))


def search_plan(
    model: PreTrainedModel,
    config: CondenseConfig | None = None,
    *,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CondensePlan:
    """Chooses experts, gates and layers on calibration data; the model stays as it is.

    Args:
        model (`PreTrainedModel`): A loaded sparse model.
        config (`CondenseConfig`, *optional*): How to search; the defaults are the paper's.
        calibration (*optional*): As in `condense_pretrained`.
        tokenizer (*optional*): For texts; by default that of the checkpoint the model was loaded from.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if the config does not fit the model, if the calibration data is empty, if activations are not
            finite, or if too few experts of a layer are chosen by any token.
    """
    config = config or CondenseConfig()
    check_methods(config)
    blocks = _open_blocks(model)
    check_config(config, blocks)
    if not isinstance(calibration, Calibration):
        if tokenizer is None and needs_tokenizer(calibration) and model.name_or_path:
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        calibration = load_calibration(calibration, config, tokenizer, model.config)
    candidates = [b for b in blocks if config.layers is None or b.layer in config.layers]
    with searching(model):
        search = _Search(model, config, candidates, calibration)
        experts = search.experts()
        if config.layers is None:
            chosen, scores, alone = search.layers(experts)
        else:
            chosen, scores, alone = config.layers, None, None
    rows = []
    for i, layer in enumerate(chosen):
        order, gates = experts[layer]
        rows.append(
            CondensedLayer(
                layer=layer,
                experts=order.experts,
                gates=[float(gates[e]) for e in order.experts],
                score=None if scores is None else scores[i],
                expert_scores=order.scores,
            )
        )
    return CondensePlan(
        layers=rows,
        model=model_shape(model, blocks),
        config=config.to_dict(),
        calibration=calibration.to_dict(),
        layer_divergences=alone,
    )


def apply_plan(model: PreTrainedModel, plan: CondensePlan | str | os.PathLike) -> PreTrainedModel:
    """Condenses a loaded model as a plan says, in place, and returns it.

    The model becomes an instance of its condensed class: `save_pretrained` writes a condensed checkpoint.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if the plan was made for another model, or if the model is condensed already. The model is then
            unchanged.
    """
    if not isinstance(plan, CondensePlan):
        plan = CondensePlan.load(plan)
    blocks = _open_blocks(model)
    plan.check_fits(model_shape(model, blocks))
    parameters_before = model.num_parameters()
    specs = apply_layers(model, blocks, plan.layers)
    become_condensed(model, plan, specs, len(specs) == len(blocks), parameters_before)
    return model


def _open_blocks(model: PreTrainedModel) -> list[SparseBlock]:
    """The sparse blocks of a loaded model whose weights can be read and computed with."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`model` should be a PreTrainedModel of transformers, but is a {type(model).__name__}; of a wrapped "
            "model (PEFT, DDP), pass the model inside."
        )
    refuse_condensed(model)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("Quantised weights can't be condensed: condense first, save, and quantise when opening again.")
    blocks = find_sparse_blocks(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "Some weights of the model are not in memory (offloaded by its device map, or on the meta device). Load it "
            "whole, or pass the checkpoint and a plan to `condense_pretrained`, which reads only the kept experts."
        )
    return blocks


def check_methods(config: CondenseConfig) -> None:
    """Checks that every method a config names is registered.

    Raises:
        ValueError: naming the field and the methods that exist.
    """
    lookup(EXPERT_SELECTIONS, config.expert_selection, "expert_selection")
    lookup(LAYER_SELECTIONS, config.layer_selection, "layer_selection")
    lookup(METRICS, config.metric, "metric")
    lookup(COMPARE, config.compare, "compare")
    lookup(GATES, config.gates, "gates")
    if config.refit not in REFITS:
        raise ValueError(f"`refit` is {config.refit!r}, but only None exists.")


class _Search:
    """One search on one model: the decoder layer by layer on the calibration tokens."""

    def __init__(
        self, model: PreTrainedModel, config: CondenseConfig, blocks: list[SparseBlock], calibration: Calibration
    ) -> None:
        self.model = model
        self.config = config
        self.blocks = {block.layer: block for block in blocks}
        layers_path = blocks[0].path.rsplit(".", 2)[0]
        self.stream = LayerStream(model, layers_path, calibration.batches)
        self.token_weights = [
            (mask / mask.sum(1, keepdim=True) / calibration.num_samples)[mask.bool()]
            for mask in (batch.attention_mask.float() for batch in calibration.batches)
        ]

    def experts(self) -> dict[int, tuple[ExpertOrder, Tensor]]:
        """Order of experts and gates of every candidate layer, with inputs from the unmodified model."""
        found = {}
        states = list(self.stream.embeddings)
        for layer in logging.tqdm(range(max(self.blocks) + 1), desc="Expert search", unit="layer"):
            if layer not in self.blocks:
                states = [self.stream.run_layer(layer, state, i) for i, state in enumerate(states)]
                _check_finite(states, layer)
                continue
            data, states = self._observe(layer, states)
            self._check_candidates(data)
            select = lookup(EXPERT_SELECTIONS, self.config.expert_selection, "expert_selection")
            found[layer] = (select(data, self.config.num_experts), data.gates)
        return found

    def layers(self, experts: dict[int, tuple[ExpertOrder, Tensor]]) -> tuple[list[int], list[float], dict[int, float]]:
        """Order of layers, its divergences, and the divergence of each layer alone."""
        mlps = {
            layer: fold(self.blocks[layer], order.experts, [float(gates[e]) for e in order.experts])
            for layer, (order, gates) in experts.items()
        }

        @contextmanager
        def condense(layer: int) -> Iterator[None]:
            with standing_in(self.model, self.blocks[layer], mlps[layer]):
                yield

        data = LayerSearchData(
            stream=self.stream,
            candidates=sorted(self.blocks),
            condense=condense,
            metric=METRICS[self.config.metric],
            output=COMPARE[self.config.compare],
            token_weights=self.token_weights,
            cache_bytes=self.config.cache_bytes,
        )
        select = lookup(LAYER_SELECTIONS, self.config.layer_selection, "layer_selection")
        order = select(data, self.config.num_layers)
        return order.layers, order.scores, order.rounds[0]

    def _observe(self, layer: int, states: list[State]) -> tuple[SparseLayerData, list[State]]:
        block = self.blocks[layer]
        recorder = LayerRecorder(self.stream, block)
        calls, outputs = [], []
        for batch, state in enumerate(states):
            call, output = recorder.record(state, batch, self.token_weights[batch])
            calls.append(call)
            outputs.append(output)
        _check_finite(outputs, layer)
        is_last = layer == len(self.stream) - 1
        data = SparseLayerData(
            block=block,
            calls=calls,
            gates=GATES[self.config.gates](calls, block.num_experts),
            metric=METRICS[self.config.metric],
            finish=self.stream.finish if is_last else _identity,
            cache_bytes=self.config.cache_bytes,
        )
        return data, outputs

    def _check_candidates(self, data: SparseLayerData) -> None:
        available = len(data.candidates)
        if available < self.config.num_experts:
            raise ValueError(
                f"Decoder layer {data.block.layer}: only {available} of {data.block.num_experts} experts were chosen "
                f"by any calibration token, so {self.config.num_experts} can't be kept (an expert that no token chose "
                "has no mean gate). Use more calibration data or a smaller `num_experts`."
            )


def _warn_of_disagreement(config: CondenseConfig, plan: CondensePlan) -> None:
    experts = max(len(layer.experts) for layer in plan.layers)
    if (config.num_layers, config.num_experts) != (len(plan.layers), experts):
        logger.warning(
            f"The plan decides: {len(plan.layers)} layers with up to {experts} experts, not the config's "
            f"{config.num_layers} and {config.num_experts}. For fewer, use `plan.truncate`."
        )


def _check_finite(states: list[State], layer: int) -> None:
    if not all(bool(torch.isfinite(state[0]).all()) for state in states):
        raise ValueError(
            f"The output of decoder layer {layer} contains NaN or infinity. Check the checkpoint, and try "
            "dtype='float32' or 'bfloat16'."
        )


def _identity(x: Tensor) -> Tensor:
    return x
