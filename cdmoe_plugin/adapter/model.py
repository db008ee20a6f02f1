"""The tuner of condense adapters, and its registration with PEFT."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..autocast import without_autocast
from ..blocks import find_sparse_blocks
from ..calibration import calibration_for
from ..condense.apply import note_refit, refuse_condensed
from ..condense.forms import FORMS
from ..config import CondenseConfig
from ..loading.adapter_weights import MLPS
from ..model.layers_cdmoe import NoRouter, Omitted
from ..model.modeling_cdmoe import ROUTER_FIELDS, silence_router_loss
from ..model.router_requests import answer_router_requests
from ..search.check import check_methods, check_neurons
from ..search.sample import refit_tokens
from .config import NAME, PREFIX, CondenseAdapterConfig, add_peft_type
from .layer import BesideLayer, CondenseLayer, CondenseTunerLayer, condense_layers, refuse_other_adapters, unwrapped
from .mixing import explain_refusals
from .mlps import check_saved, empty_mlp, folded_mlps, refit_mlps, refuse_quantised

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "weight", "bias")


class CondenseModel(BaseTuner):
    """A model with condensed MLPs beside the sparse blocks of the layers of a plan.

    With an active adapter it computes what `apply_plan` makes of the model; with none it is the sparse model.
    """

    prefix = PREFIX
    tuner_layer_cls = CondenseTunerLayer
    target_module_mapping: dict[str, list[str]] = {}

    # The configs are `CondenseAdapterConfig`s.
    peft_config: Any
    # Fields of the router's loss and their values before it was silenced; None while it is not.
    _router_loss: list[tuple[Any, str, Any]] | None = None

    # --- new layers ---

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ValueError: if there is one of that name, or if PEFT would take the name for that of a module.
        """
        if any(adapter_name in layer.cdmoe_mlp for layer in condense_layers(model)):
            raise ValueError(
                f"The model has a condense adapter {adapter_name!r} already: use another name, or call `unload()` or "
                "`delete_adapter()` on its `PeftModel` first."
            )
        refuse_other_adapters(model)
        # When another adapter is saved, PEFT leaves out all weights that have this name anywhere in theirs.
        taken = {part for name, _ in model.named_modules() for part in name.split(".")}
        if adapter_name in taken.union(_PROJECTIONS):
            raise ValueError(f"The adapter can't be called {adapter_name!r}, as modules of the model are: rename it.")
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @without_autocast
    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """Make the MLPs of a new adapter: empty ones if weights will be loaded, otherwise folded ones."""
        model = self.model
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"Condense adapters need a PreTrainedModel, but the model is a {type(model).__name__}.")
        refuse_condensed(model)
        self._made: dict[str, Any] = {}  # by the names of their blocks in the base model
        with unwrapped(model):
            if peft_config.is_saved:
                check_saved(model, peft_config)
            else:
                self._made = folded_mlps(model, peft_config)
        base = next(name for name, module in model.named_modules() if module is model.base_model)
        # The whole names of blocks, also if they have wrappers already.
        self._specs = {f"{base}.{spec['module']}".lstrip("."): spec for spec in (peft_config.layers or {}).values()}
        # A pattern: PEFT replaces a list of more than 20 names by suffixes, which other modules may share.
        peft_config.target_modules = "|".join(map(re.escape, self._specs))
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        spec = self._specs[current_key]
        layer = target if isinstance(target, CondenseLayer) else CondenseLayer(target)
        mlp = self._made.pop(spec["module"], None)
        folded = mlp is not None
        if mlp is None:
            mlp = empty_mlp(self.model, layer.base_layer, spec)
        if layer is not target:
            beside = {name: Omitted() for name in spec["omitted"]}
            beside |= {} if spec.get("router") is None else {spec["router"]: NoRouter()}
            setattr(parent, target_name, layer)
            for name, absent in beside.items():
                setattr(parent, name, BesideLayer(getattr(parent, name), layer, absent))
        layer.add(adapter_name, mlp, loaded=folded)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's method reads `weight`, which a sparse block does not have

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Make weights float32 for training: half precision loses most of a small update."""
        if not self.peft_config[adapter_name].inference_mode:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    # --- the active adapter ---

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._settle_router_loss()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._settle_router_loss()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._settle_router_loss()

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("`adapter_names`: all rows of a batch use the active condense adapter.")
        yield

    def _settle_router_loss(self) -> None:
        """Silence the router's load-balancing loss while no router is left, as `apply_plan`, and restore it after."""
        layers = condense_layers(self.model)
        shape = next((config.condense_plan.model for config in self.peft_config.values()), None)
        condensed = sum(layer.standing_in is not None for layer in layers)
        everywhere = shape is not None and condensed == len(shape.sparse_layers)
        if everywhere and self._router_loss is None:
            holders = (self.model.config, self.model.config.get_text_config(), self.model)
            fields = [(h, name, getattr(h, name)) for h in holders for name in ROUTER_FIELDS if hasattr(h, name)]
            self._router_loss = fields
            self._router_hooks = [silence_router_loss(self.model), answer_router_requests(self.model)]
        elif not everywhere and self._router_loss is not None:
            for holder, name, value in self._router_loss:
                setattr(holder, name, value)
            for hook in self._router_hooks:
                hook.remove()
            self._router_loss = None

    # --- files ---

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT removes the name only where it is the last part or the last but one.
        return key.replace(f".{MLPS}.{adapter_name}.", f".{MLPS}.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Insert the adapter's name into the names of weights.

        Raises:
            ValueError: if weights of its MLPs are missing, or there are others.
        """
        state_dict = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        expected = {key for key in model.state_dict() if f".{MLPS}.{adapter_name}." in key}
        wrong = sorted(expected ^ {key for key in state_dict if f".{MLPS}." in key})
        if wrong:
            raise ValueError(
                f"The adapter's weights are not those of its config: {len(wrong)} are missing or not in the config, "
                f"such as {wrong[:3]}. The files are damaged or belong to different adapters."
            )
        return state_dict

    # --- refit ---

    @without_autocast
    def refit(
        self,
        config: CondenseConfig,
        *,
        calibration: Any = None,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | str | os.PathLike | None = None,
    ) -> None:
        """Fit the MLPs of the active adapter to the sparse model, as `apply_plan` does with the same config.

        They are folded anew from the plan, so this comes before any training. A `PeftModel` passes the call on:
        `peft_model.refit(CondenseConfig(refit="down_proj"), calibration="texts.jsonl")`.

        Args:
            config (`CondenseConfig`): Its `refit` and the fields beside it, and those of calibration data.
            calibration (*optional*): As in `search_plan`.
            tokenizer (*optional*): As in `search_plan`.

        Raises:
            ValueError: if no single adapter is active, if `refit` is not set or can't choose the plan's neurons, if the
                base model is quantised, or if the calibration data can't be used. The adapter is then unchanged.
        """
        if len(self.active_adapters) != 1:
            raise ValueError(f"One adapter can be refitted at a time, but {self.active_adapters} are active.")
        check_methods(config)
        if config.refit is None:
            raise ValueError("`refit` of the config is None: set it to a method, such as 'down_proj'.")
        if config.gates_tokens:
            raise ValueError(
                f"`gates` is {config.gates!r}, but the MLPs of a condense adapter have no gates per token: set it to "
                "'mean', or use `apply_plan`."
            )
        refuse_quantised(self.model)
        name = self.active_adapters[0]
        own = self.peft_config[name]
        check_neurons(config, own.condense_plan)
        with unwrapped(self.model):
            tokens = refit_tokens(config, find_sparse_blocks(self.model), own.condense_plan)
        data = calibration_for(self.model, calibration, config, tokenizer, tokens)
        refit_mlps(self.model, name, own, config, data)

    # --- unloading ---

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        refuse_other_adapters(self.model)
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self._settle_router_loss()
        return model

    @without_autocast
    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """Return the condensed model, as `apply_plan` makes it, with the weights of one adapter.

        Args:
            progressbar (`bool`, defaults to `False`): Whether to show the progress.
            safe_merge (`bool`, defaults to `False`): Whether to check that the weights are finite.
            adapter_names (`list[str]`, *optional*): The adapter; the active one by default.

        Raises:
            ValueError: if the base model is quantised, if there are other adapters of PEFT in it, or if weights were
                not loaded. The model is then unchanged.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        if len(names) != 1 or names[0] not in self.peft_config:
            raise ValueError(f"One of the adapters {sorted(self.peft_config)} can be merged, not {names}.")
        model, config = self.model, self.peft_config[names[0]]
        refuse_other_adapters(model)
        if getattr(model, "hf_quantizer", None) is not None:
            raise ValueError(
                "A condensed model with a quantised base can't be saved in one piece: save the adapter, condense with "
                "`condense_pretrained(base, plan=adapter_folder)`, and quantise the result when it is opened."
            )
        layers = {int(number): model.base_model.get_submodule(spec["module"]) for number, spec in config.layers.items()}
        with unwrapped(model):
            blocks = find_sparse_blocks(model)
        dtypes = {block.layer: block.dtype for block in blocks}
        mlps = {number: layer.merged_mlp(names[0], dtypes[number]) for number, layer in layers.items()}
        bad = [n for n, mlp in mlps.items() if safe_merge and not all(p.isfinite().all() for p in mlp.parameters())]
        if bad:
            raise ValueError(f"The condensed MLPs of decoder layers {bad} have weights that are not finite.")
        self._unload_and_optionally_merge(progressbar=progressbar, adapter_names=names)
        plan = config.condense_plan
        FORMS[plan.form].apply(model, blocks, plan, mlps)
        note_refit(model, config.refit or {})
        return model


def register() -> None:
    """Add the method to PEFT. Safe to call again."""
    if add_peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME, config_cls=CondenseAdapterConfig, model_cls=CondenseModel, prefix=PREFIX)
        explain_refusals()
