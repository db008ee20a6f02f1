"""Condensed Mixture-of-Experts models for transformers.

In a *condensed* layer, a dense gated MLP replaces the sparse block: the shared expert and the kept experts, with
constant gates and without a router (CD-MoE, arXiv 2412.00069). Every model class `X` of transformers has a subclass
`CDMoEX`, made on first use, and its config class one with `model_type` "cdmoe_<base>". `config.condense_config` holds
the condensed layers and their widths; weights keep the base model's names.

This file and `layers_cdmoe.py` are also saved beside weights, for `trust_remote_code=True` where the package
`cdmoe_plugin` is not installed. They therefore import only torch, transformers and each other.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .layers_cdmoe import install_condensed_layers

PREFIX = "CDMoE"
MODEL_TYPE_PREFIX = "cdmoe_"
# Names of the config field with the weight of the router's load-balancing loss.
_ROUTER_LOSS_FIELDS = ("router_aux_loss_coef", "aux_loss_alpha", "router_z_loss_coef")

# Type checkers see a model; at run time, `ClassFactory` adds the base class.
_Model: Any = PreTrainedModel if TYPE_CHECKING else object


class CondensedModelMixin(_Model):
    """A model with condensed layers, whose `from_pretrained` refuses a checkpoint that lacks weights."""

    _base_class: Any

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install_condensed_layers(self)
        if (config.condense_config or {}).get("all_condensed"):
            silence_router_loss(self)
        self.post_init()

    @property
    def condense_plan(self) -> Any:
        """The applied plan as a `dict`, or None if the config has none."""
        return (self.config.condense_config or {}).get("plan")

    # transformers searches the source of the class's module for "@use_experts_implementation" and falls back to the
    # slow loop over experts without it; only the base class's module has it.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls._base_class._can_set_experts_implementation()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls._base_class._can_set_attn_implementation()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as `PreTrainedModel.from_pretrained`, but refuse one that lacks weights of the base model.

        Raises:
            ValueError: if a weight of the base model is missing or has another shape, or if the checkpoint has weights
                in a condensed layer that this layer does not have.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        _refuse_another_checkpoint(model, info)
        return (model, info) if wants_info else model


def _refuse_another_checkpoint(model: Any, info: Mapping[str, Any]) -> None:
    # Only a new head, such as a classifier's, may start from random weights.
    whole = model.base_model is model or model.get_output_embeddings() is not None
    random = {str(key) for key in info.get("missing_keys", ())}
    random |= {str(key[0]) for key in info.get("mismatched_keys", ())}  # with `ignore_mismatched_sizes`
    lost = sorted(key for key in random if whole or key.startswith(f"{model.base_model_prefix}."))
    if lost:
        raise ValueError(
            f"The checkpoint {model.name_or_path!r} lacks {len(lost)} weights of this condensed model, such as "
            f"{lost[:3]}: it was not saved completely, or its config.json belongs to another checkpoint."
        )
    places = []
    for spec in model.config.condense_config["condensed_layers"].values():
        layer = spec["module"].rpartition(".")[0]
        others = [name for name in (*spec["omitted"], spec.get("router")) if name is not None]
        places += [f"{spec['module']}.", *(f"{layer}.{name}." for name in others)]
    unused = sorted(str(key) for key in info.get("unexpected_keys", ()) if any(p in str(key) for p in places))
    if unused:
        raise ValueError(
            f"The checkpoint {model.name_or_path!r} has {len(unused)} weights for which its condensed layers have "
            f"no place, such as {unused[:3]}: its config.json was edited or belongs to another checkpoint."
        )


def silence_router_loss(model: PreTrainedModel) -> None:
    """Turn the router's load-balancing loss off, in the config and on the model, if no router is left.

    transformers fails to compute that loss without any router, and TRL switches it on whenever the config has a
    coefficient other than 0.
    """
    config = model.config
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    for field in _ROUTER_LOSS_FIELDS:
        for holder in (config, model):
            if getattr(holder, field, None):
                setattr(holder, field, 0.0)


def tensor_parallel_plan(base_plan: Mapping[str, str] | None, config: Any) -> dict[str, str] | None:
    """Add the condensed MLPs to the base architecture's tensor parallel plan.

    Names are patterns ("layers.*.mlp.up_proj") that also match sparse layers and layers that were always dense. The
    former have other names inside, the latter the same gated MLP. A per-token gate scales only the first neurons of the
    MLP: with such a gate, the neurons of all processes are gathered before it and split again after it.
    """
    if not base_plan:
        return None
    plan = dict(base_plan)
    layers = config.condense_config.get("condensed_layers") if isinstance(config.condense_config, Mapping) else None
    specs = [spec for spec in layers.values() if isinstance(spec, Mapping)] if isinstance(layers, Mapping) else []
    # A trimmed MLP has nothing to split; an invalid spec is refused when the layers are made.
    specs = [spec for spec in specs if isinstance(spec.get("module"), str) and "shared_expert_gate" in spec]
    for spec in sorted(specs, key=lambda spec: bool(spec["shared_expert_gate"])):
        place = re.sub(r"\.\d+(?=\.|$)", ".*", spec["module"])
        if spec.get("router") is not None:  # under the name of other layers' experts: neither is split
            plan = {name: how for name, how in plan.items() if not f"{name}.".startswith(f"{place}.")}
            continue
        gated = ("colwise_gather_output", "rowwise_split_input")
        inner, outer = gated if spec["shared_expert_gate"] else ("colwise", "rowwise")
        plan |= {f"{place}.gate_proj": inner, f"{place}.up_proj": inner, f"{place}.down_proj": outer}
    return plan


class ClassFactory:
    """A factory of condensed classes, made on first use as attributes of a module for pickle and the auto classes.

    Args:
        module (`str`): Name of the module.
        mixin (`type`): The mixin of its model classes.
    """

    def __init__(self, module: str, mixin: type[CondensedModelMixin]) -> None:
        self.module = module
        self.mixin = mixin

    def by_name(self, name: str, architectures: Any = transformers) -> Any:
        """Make `CDMoE<X>` for a config or model class `<X>` of transformers, or of the module `architectures`.

        Raises:
            AttributeError: if there is no such class.
        """
        if name.startswith(PREFIX):
            base = getattr(architectures, name.removeprefix(PREFIX), None)
            if isinstance(base, type) and issubclass(base, PreTrainedConfig):
                return self.config_class(base)
            if isinstance(base, type) and issubclass(base, PreTrainedModel):
                return self.model_class(base)
        raise AttributeError(f"module {self.module!r} has no attribute {name!r}")

    def config_class(self, base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
        """Make the config class of condensed models on `base`: its fields and `condense_config` (`dict`)."""

        def get_plan(config: Any) -> dict[str, str] | None:
            return tensor_parallel_plan(vars(config).get("base_model_tp_plan", base.base_model_tp_plan), config)

        def set_plan(config: Any, plan: dict[str, str] | None) -> None:
            vars(config)["base_model_tp_plan"] = plan  # transformers 5.17 to 5.19 set it if embeddings are tied

        return self._made(
            base,
            (base,),
            {
                "model_type": MODEL_TYPE_PREFIX + base.model_type,
                "condense_config": None,
                "base_model_tp_plan": property(get_plan, set_plan),
                "__annotations__": {"condense_config": "dict | None"},
            },
        )

    def model_class(self, base: Any) -> Any:
        """Make the condensed subclass of a model class."""
        if issubclass(base, CondensedModelMixin):
            return base
        config_class = self.config_class(base.config_class)
        for known, new in (
            (base.__name__, PREFIX + base.__name__),
            (base.config_class.model_type, config_class.model_type),
        ):
            mapping = get_checkpoint_conversion_mapping(known)
            # Without it, the names on disk would change, and original checkpoints would not open.
            if mapping is not None and get_checkpoint_conversion_mapping(new) is None:
                register_checkpoint_conversion_mapping(new, mapping)
        made = self._made(base, (self.mixin, base), {"config_class": config_class, "_base_class": base})
        # Classification heads make their decoder with `AutoModel.from_config`, even if this file is a copy.
        decoders = AutoModel._model_mapping
        if base.config_class in decoders and config_class not in decoders:
            decoder: Any = decoders[base.config_class]
            decoder = decoder[0] if isinstance(decoder, (list, tuple)) else decoder
            AutoModel.register(config_class, made if decoder is base else self.model_class(decoder), exist_ok=True)
        return made

    def _made(self, base: type, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        name = PREFIX + base.__name__
        module = sys.modules[self.module]
        if name not in vars(module):
            setattr(module, name, type(name, bases, {"__module__": self.module, "__qualname__": name, **namespace}))
        return vars(module)[name]


_classes = ClassFactory(__name__, CondensedModelMixin)


def __getattr__(name: str) -> Any:
    """Make `CDMoE<X>` for a config or model class `<X>` of transformers."""
    return _classes.by_name(name)
