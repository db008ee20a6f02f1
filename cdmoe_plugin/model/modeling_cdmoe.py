"""Condensed Mixture-of-Experts models for transformers (CD-MoE, arXiv 2412.00069).

In a *condensed* layer, a dense gated MLP replaces the sparse block, or most of its experts. Every model class `X` of
transformers has a subclass `CDMoEX`, made on first use, and its config class one with `model_type` "cdmoe_<base>".
`config.condense_config` describes the condensed layers; weights keep the base model's names.

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
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .layers_cdmoe import install_condensed_layers

PREFIX = "CDMoE"
MODEL_TYPE_PREFIX = "cdmoe_"
# Config fields of the router's load-balancing loss, and their values without a router.
ROUTER_FIELDS: dict[str, Any] = dict.fromkeys(("router_aux_loss_coef", "aux_loss_alpha", "router_z_loss_coef"), 0.0)
ROUTER_FIELDS["output_router_logits"] = False

# Type checkers see a model; at run time, `ClassFactory` adds the base class.
_Model: Any = PreTrainedModel if TYPE_CHECKING else object


class CondensedModelMixin(_Model):
    """A model with condensed layers, whose `from_pretrained` refuses a checkpoint that lacks weights."""

    _base_class: Any

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install_condensed_layers(self)
        made = config.condense_config or {}
        if made.get("no_router_loss", made.get("all_condensed")):
            silence_router_loss(self)
        self.post_init()
        # With the plans of inner models, which overwrite that of the config.
        body = "" if self.base_model is self else f"{self.base_model_prefix}."
        self._tp_plan: Any = tensor_parallel_plan(self._tp_plan, config, body) or {}

    @property
    def condense_plan(self) -> Any:
        """The applied plan as a `dict`, or None if the config has none."""
        return (self.config.condense_config or {}).get("plan")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: if weights of the base model are missing, have other shapes, or are not those of its layers.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        _refuse_another_checkpoint(model, info)
        return (model, info) if wants_info else model


def _refuse_another_checkpoint(model: Any, info: Mapping[str, Any]) -> None:
    # Only a new head, such as a classifier's, may start from random weights.
    whole = model.base_model is model or model.get_output_embeddings() is not None
    shapes = {str(key[0]): tuple(map(list, key[1:])) for key in info.get("mismatched_keys", ())}
    random = shapes.keys() | {str(key) for key in info.get("missing_keys", ())}
    lost = sorted(key for key in random if whole or key.startswith(f"{model.base_model_prefix}."))
    others = [f"{key} {shapes[key][0]} for {shapes[key][1]}" for key in lost if key in shapes]
    if others:  # with `ignore_mismatched_sizes`
        raise ValueError(
            f"The checkpoint {model.name_or_path!r} has {len(others)} weights of other shapes than this model, such as "
            f"{others[:3]}. `ignore_mismatched_sizes` is for new heads, `resize_token_embeddings` for a vocabulary."
        )
    if lost:
        raise ValueError(
            f"The checkpoint {model.name_or_path!r} lacks {len(lost)} weights of this condensed model, such as "
            f"{lost[:3]}: it was not saved completely, or its config.json belongs to another checkpoint."
        )
    specs = model.config.condense_config["condensed_layers"].values()
    places = tuple(f"{spec['module'].rpartition('.')[0]}." for spec in specs)
    prefix = f"{model.base_model_prefix}."
    unused = sorted(k for k in map(str, info.get("unexpected_keys", ())) if k.removeprefix(prefix).startswith(places))
    if unused:
        raise ValueError(
            f"The checkpoint {model.name_or_path!r} has {len(unused)} weights for which its condensed layers have "
            f"no place, such as {unused[:3]}: its config.json was edited or belongs to another checkpoint."
        )


def silence_router_loss(model: PreTrainedModel) -> Any:
    """Turn the router's load-balancing loss off in the config, on the model and in its calls; return that hook.

    transformers can't compute it without routers or with different ones. TRL asks for it if its coefficient is not 0.
    """
    for holder in (model.config, model.config.get_text_config(), model):
        for field, value in ROUTER_FIELDS.items():
            if getattr(holder, field, None):
                setattr(holder, field, value)
    return model.register_forward_pre_hook(_without_router_logits, with_kwargs=True)


def _without_router_logits(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    asked = kwargs.get("output_router_logits") or getattr(model.config.get_text_config(), "output_router_logits", False)
    return args, {**kwargs, "output_router_logits": False} if asked else kwargs


def tensor_parallel_plan(base_plan: Mapping[str, str] | None, config: Any, body: str = "") -> dict[str, str] | None:
    """Add the condensed MLPs to the tensor parallel plan of a base model, or of a model that has it as `body`.

    Names are patterns ("layers.*.mlp.up_proj") that also match sparse layers and layers that were always dense. The
    former have other names inside, the latter the same gated MLP. Per-token gates scale some neurons of the MLP: with
    such gates, the neurons of all processes are gathered before them and split again after them.
    """
    if not base_plan:
        return None
    plan = dict(base_plan)
    layers = config.condense_config.get("condensed_layers") if isinstance(config.condense_config, Mapping) else None
    found = [spec for spec in layers.values() if isinstance(spec, Mapping)] if isinstance(layers, Mapping) else []
    found = [spec.get("dense") or spec for spec in found]
    # A trimmed MLP has nothing to split; an invalid spec is refused when the layers are made.
    specs = [spec for spec in found if isinstance(spec.get("module"), str) and "shared_expert_gate" in spec]
    gated = lambda spec: bool(spec["shared_expert_gate"] or spec.get("gated_neurons"))  # noqa: E731
    for spec in sorted(specs, key=gated):
        place = body + re.sub(r"\.\d+(?=\.|$)", ".*", spec["module"])
        if spec.get("router") is not None:  # under the name of other layers' experts: neither is split
            plan = {name: how for name, how in plan.items() if not f"{name}.".startswith(f"{place}.")}
            continue
        inner, outer = ("_gather_output", "_split_input") if gated(spec) else ("", "")
        plan |= {f"{place}.{name}_proj": f"colwise{inner}" for name in ("gate", "up")}
        plan[f"{place}.down_proj"] = f"rowwise{outer}"
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
        """Make `CDMoE<X>` for a class `<X>` of transformers or of `architectures`, or raise an `AttributeError`."""
        base = getattr(architectures, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
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

        namespace = {
            "model_type": MODEL_TYPE_PREFIX + base.model_type,
            "condense_config": None,
            "auto_map": {},  # TRL 1.16 reads it from every config class that transformers lacks
            "base_model_tp_plan": property(get_plan, set_plan),
            "__annotations__": {"condense_config": "dict | None"},
        }
        return self._made(base, (base,), namespace)

    def model_class(self, base: Any) -> Any:
        """Make the condensed subclass of a model class."""
        if issubclass(base, CondensedModelMixin):
            return base
        config_class = self.config_class(base.config_class)
        for known, prefix in ((base.__name__, PREFIX), (base.config_class.model_type, MODEL_TYPE_PREFIX)):
            mapping = get_checkpoint_conversion_mapping(known)
            # Without it, the names on disk would change, and original checkpoints would not open.
            if mapping is not None and get_checkpoint_conversion_mapping(prefix + known) is None:
                register_checkpoint_conversion_mapping(prefix + known, mapping)
        namespace = {"config_class": config_class, "_base_class": base}
        # transformers searches the source of the class's module for "@use_experts_implementation" and falls back to the
        # slow loop over experts without it; only the base class's module has it.
        for name in ("_can_set_experts_implementation", "_can_set_attn_implementation"):
            namespace[name] = staticmethod(getattr(base, name))
        made = self._made(base, (self.mixin, base), namespace)
        # Classification heads make their decoder with `AutoModel.from_config`, even if this file is a copy.
        decoders = AutoModel._model_mapping
        if base.config_class in decoders and config_class not in decoders:
            found: Any = decoders[base.config_class]
            decoder = found[0] if isinstance(found, (list, tuple)) else found
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
