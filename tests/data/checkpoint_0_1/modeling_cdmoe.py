"""Condensed Mixture-of-Experts models for transformers.

A *condensed* layer is a sparse block whose router is gone and whose kept experts, with constant gates, are
folded with the shared expert into one dense gated MLP (CD-MoE, arXiv 2412.00069). This file knows how to build
and open such models, and nothing of how experts and layers are chosen. It and the two that it imports have two
lives: as modules of the package `cdmoe_plugin`, and as copies beside saved weights, which `trust_remote_code=True`
opens where the package is not installed. So they import torch, transformers and each other only.

For every model class `X` of transformers there is a class `CDMoEX` here, a subclass made on first use, and for
its config class one with `model_type` "cdmoe_<base>". `config.condense_config` says which layers are condensed
and how wide they are; weights keep the names of the base architecture.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from .layers_cdmoe import install_condensed_layers
from .saving_cdmoe import is_someones_card, replacing_files

logger = logging.get_logger(__name__)

PREFIX = "CDMoE"
MODEL_TYPE_PREFIX = "cdmoe_"
PLAN_FILE = "condense_plan.json"
MODELING_FILE = "modeling_cdmoe.py"
IMPORTED_FILES = ("layers_cdmoe.py", "saving_cdmoe.py")
# Config fields that hold the weight of a router's load-balancing loss, as architectures name them.
_ROUTER_LOSS_FIELDS = ("router_aux_loss_coef", "aux_loss_alpha", "router_z_loss_coef")


def silence_router_loss(model: PreTrainedModel) -> None:
    """Turns the router's load-balancing loss off, in the config and on the model, once no router is left.

    transformers computes that loss over all routers and fails on none of them; TRL switches it on by itself
    wherever the config holds a coefficient other than 0.
    """
    config = model.config
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    for field in _ROUTER_LOSS_FIELDS:
        for holder in (config, model):
            if getattr(holder, field, None):
                setattr(holder, field, 0.0)


def settle_bitsandbytes(model: Any) -> None:
    """Makes a model with layers of bitsandbytes compute from its weights as they are stored, and be saved again.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4 bit layer's weights at its first forward pass in eval mode.
    That fails unless `out_features % 32 == 0` and `in_features % 64 == 0`, which a gate per token (one row) never has.
    Where it succeeds, no gradient passes through the layer any more, `dequantize()` returns other weights, and so does
    opening what is saved without double quantisation. So the layers are told not to.

    A checkpoint that was quantised when it was opened can't be saved again in transformers 5.17 to 5.23: their reader
    of quantised weights is noted as something to undo, and has no inverse. It needs none.
    """
    if getattr(model, "quantization_method", None) != "bitsandbytes":
        return
    narrow = []
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if module.in_features % 64 in (16, 32, 48) and module.weight.device.type == "cpu":
                narrow.append(name)
    if narrow:
        logger.warning(
            f"The input widths of {len(narrow)} layers in 4 bit, such as {narrow[0]}, are no multiples of 64: "
            "bitsandbytes 0.50 computes wrong values from such weights on some CPUs. Use 8 bit, or name these layers "
            "in `llm_int8_skip_modules`."
        )
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [conversion for conversion in conversions if _has_inverse(conversion)]


def _has_inverse(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


# For type checkers, a condensed model is a model; at run time the base class comes in by `condensed_model_class`.
_Model: Any = PreTrainedModel if TYPE_CHECKING else object


class CondensedModelMixin(_Model):
    """What a condensed model adds to its base class: the condensed layers, strict loading, and safe saving."""

    _base_class: Any

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install_condensed_layers(self)
        if (config.condense_config or {}).get("all_condensed"):
            silence_router_loss(self)
        self.post_init()

    @property
    def condense_plan(self) -> Any:
        """The plan that was applied: a `CondensePlan` with the package installed, else its plain `dict`."""
        plan = (self.config.condense_config or {}).get("plan")
        return plan if plan is None else plan_from_dict(plan)

    # transformers looks for "@use_experts_implementation" in the source of a class's own module, here in vain, and
    # would fall back to the slow loop over experts; the base class knows.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls._base_class._can_set_experts_implementation()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls._base_class._can_set_attn_implementation()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, but raises where weights of the decoder are missing.

        Raises:
            ValueError: if any weight of the base model is not in the checkpoint or has another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        prefix = f"{model.base_model_prefix}."
        # Only a head that is new, such as that of a classifier, may start from random weights.
        whole = model.base_model is model or model.get_output_embeddings() is not None
        random = {str(key) for key in info.get("missing_keys", ())}
        random |= {str(key[0]) for key in info.get("mismatched_keys", ())}  # where the caller ignores the sizes
        lost = sorted(key for key in random if whole or key.startswith(prefix))
        if lost:
            raise ValueError(
                f"The checkpoint {model.name_or_path!r} lacks {len(lost)} weights of this condensed model, such as "
                f"{lost[:3]}: it was not saved whole, or its config.json belongs to another checkpoint."
            )
        places = [
            f"{name}."
            for spec in model.config.condense_config["condensed_layers"].values()
            for name in (
                spec["module"],
                *(
                    f"{spec['module'].rpartition('.')[0]}.{other}"
                    for other in (*spec["omitted"], spec.get("router"))
                    if other is not None
                ),
            )
        ]
        unused = sorted(str(key) for key in info.get("unexpected_keys", ()) if any(p in str(key) for p in places))
        if unused:
            raise ValueError(
                f"The checkpoint {model.name_or_path!r} has {len(unused)} weights for which its condensed layers have "
                f"no place, such as {unused[:3]}: its config.json was edited or belongs to another checkpoint."
            )
        settle_bitsandbytes(model)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, and adds the plan, the modeling files and a model card.

        Whatever happens meanwhile, `save_directory` holds the old checkpoint or the new one, see `replacing_files`.
        """
        only_adapters = getattr(self, "_hf_peft_config_loaded", False)
        # Under torch.distributed, transformers lets the first process alone write.
        saves = getattr(self, "should_save_on_this_rank", bool)(is_main_process)
        if only_adapters or not saves or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, is_main_process, **kwargs)
            return
        if any(parameter.is_meta for parameter in self.parameters()):  # offloaded: a file is put together in memory
            kwargs.setdefault("max_shard_size", "1GB")
            state_dict = state_of_offloaded(self) if kwargs.get("state_dict") is None else None
            if state_dict is not None:
                kwargs |= {"state_dict": state_dict, "save_original_format": False}
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        self.config.auto_map = auto_map(type(self), getattr(self.config, "auto_map", None))
        variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
        stale = re.compile(
            rf"model{re.escape(variant)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?|model\.safetensors\.index{re.escape(variant)}\.json"
        )
        with replacing_files(save_directory, stale) as folder:
            for name, text in modeling_files(type(self)).items():
                (folder / name).write_text(text, encoding="utf-8")
            plan = (self.config.condense_config or {}).get("plan")
            if plan is not None:
                text = json.dumps(plan, indent=2, sort_keys=True)
                (folder / PLAN_FILE).write_text(text + "\n", encoding="utf-8")
            write_model_card(self, folder)
            super().save_pretrained(folder, **kwargs)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        """The last step of both `push_to_hub` and `save_pretrained(push_to_hub=True)`: uploads what was saved.

        transformers has just put a generic card over ours, and would leave out files that were written before its own.
        A card of the hub's repository that somebody wrote stays.
        """
        if not getattr(self, "_hf_peft_config_loaded", False):
            if not is_someones_card(Path(working_dir, "README.md")):
                write_model_card(self, Path(working_dir))
            files_timestamps = {}  # the folder is a temporary one and holds this checkpoint alone
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)


def plan_from_dict(plan: dict[str, Any]) -> Any:
    """Hook for the package, which returns a `CondensePlan` instead."""
    return plan


def write_model_card(model: PreTrainedModel, folder: Path) -> None:
    """Hook for the package, which writes a README.md."""


def state_of_offloaded(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """Hook for the package, which knows where the weights of its offloaded models are."""
    return None


# --- classes, made on first use --------------------------------------------------------------------------------------


def condensed_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of condensed models on `base`: its fields and `condense_config` (`dict`, *optional*)."""

    def get_plan(config: Any) -> dict[str, str] | None:
        return tensor_parallel_plan(vars(config).get("base_model_tp_plan", base.base_model_tp_plan), config)

    def set_plan(config: Any, plan: dict[str, str] | None) -> None:
        vars(config)["base_model_tp_plan"] = plan  # as transformers 5.17 to 5.19 do where embeddings are tied

    return _make_class(
        base,
        (base,),
        {
            "model_type": MODEL_TYPE_PREFIX + base.model_type,
            "condense_config": None,
            "base_model_tp_plan": property(get_plan, set_plan),
            "__annotations__": {"condense_config": "dict | None"},
            "__doc__": f"Config of a condensed model on `{base.__name__}`.",
        },
    )


def tensor_parallel_plan(base_plan: Mapping[str, str] | None, config: Any) -> dict[str, str] | None:
    """How the modules of a condensed model are split over processes: the base architecture's plan, and its MLPs.

    Names are patterns ("layers.*.mlp.up_proj"), so layers that are sparse or dense by birth share the entries; they
    have other names inside, or the same gated MLP. A gate per token scales the first of the MLP's neurons: with such a
    gate, what the processes have of them is gathered before, and split again after.

    Args:
        base_plan (`Mapping[str, str]`, *optional*): The base architecture's; None, if it can't be split, stays None.
        config: A condensed model's config.
    """
    if not base_plan:
        return None
    plan = dict(base_plan)
    layers = config.condense_config.get("condensed_layers") if isinstance(config.condense_config, Mapping) else None
    # A trimmed MLP has nothing to split; what can't be understood is refused when the layers are made.
    specs = [
        spec
        for spec in (layers.values() if isinstance(layers, Mapping) else ())
        if isinstance(spec, Mapping) and isinstance(spec.get("module"), str) and "shared_expert_gate" in spec
    ]
    for spec in sorted(specs, key=lambda spec: bool(spec["shared_expert_gate"])):
        inner, outer = ("colwise", "rowwise")
        if spec["shared_expert_gate"]:
            inner, outer = "colwise_gather_output", "rowwise_split_input"
        place = re.sub(r"\.\d+(?=\.|$)", ".*", spec["module"])
        if spec.get("router") is not None:  # it stands where other layers have their experts: neither is split
            plan = {name: how for name, how in plan.items() if not f"{name}.".startswith(f"{place}.")}
            continue
        plan |= {f"{place}.gate_proj": inner, f"{place}.up_proj": inner, f"{place}.down_proj": outer}
    return plan


def condensed_model_class(base: Any) -> Any:
    """The condensed subclass of a model class of transformers (or of another architecture that it knows)."""
    if issubclass(base, CondensedModelMixin):
        return base
    config_class = condensed_config_class(base.config_class)
    for known, new in (
        (base.__name__, PREFIX + base.__name__),
        (base.config_class.model_type, config_class.model_type),
    ):
        mapping = get_checkpoint_conversion_mapping(known)
        # Without this, the names on disk would change, and original checkpoints would not be understood.
        if mapping is not None and get_checkpoint_conversion_mapping(new) is None:
            register_checkpoint_conversion_mapping(new, mapping)
    made = _make_class(
        base,
        (CondensedModelMixin, base),
        {
            "config_class": config_class,
            "_base_class": base,
            "__doc__": f"`{base.__name__}` with condensed layers.",
        },
    )
    # Classification heads build their decoder by `AutoModel.from_config`, also where this file is but a copy.
    decoder = auto_classes(base.config_class).get("AutoModel")
    if decoder is not None and config_class not in AutoModel._model_mapping:
        AutoModel.register(config_class, made if decoder is base else condensed_model_class(decoder), exist_ok=True)
    return made


def _make_class(base: type, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
    name = PREFIX + base.__name__
    made = globals().get(name)
    if made is None:
        made = type(name, bases, {"__module__": __name__, "__qualname__": name, **namespace})
        globals()[name] = made
    return made


def _of_package(name: str) -> Any:
    """A class of DeepSeekMoE-16B's architecture, which transformers lacks; copies of this file have it themselves."""
    if __package__ != "cdmoe_plugin" or not name.startswith("Deepseek"):
        return None
    return getattr(import_module("cdmoe_plugin.models.deepseek.modeling_deepseek"), name, None)


def __getattr__(name: str) -> Any:
    """Makes `CDMoE<X>` for a config or model class `<X>` of transformers, or of this file."""
    if name.startswith(PREFIX):
        base_name = name.removeprefix(PREFIX)
        base = globals().get(base_name) or getattr(transformers, base_name, None) or _of_package(base_name)
        if isinstance(base, type) and issubclass(base, PreTrainedConfig):
            return condensed_config_class(base)
        if isinstance(base, type) and issubclass(base, PreTrainedModel):
            return condensed_model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def auto_classes(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """The model class that each AutoModel class of transformers opens for a config class, by the auto class's name."""
    found = {}
    for auto_name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None)
        if not (isinstance(auto_class, type) and auto_name.startswith("AutoModel")) or mapping is None:
            continue
        if config_class in mapping:
            model_class = mapping[config_class]
            found[auto_name] = model_class[0] if isinstance(model_class, (list, tuple)) else model_class
    return found


def auto_map(model_class: Any, before: Mapping[str, str] | None = None) -> dict[str, str]:
    """What config.json tells `trust_remote_code=True`: which class of the copied file each auto class opens.

    Args:
        model_class: The condensed model class that is saved.
        before (`Mapping[str, str]`, *optional*): The entries of the checkpoint that was opened. In the copied file an
            architecture of its own is not registered, and these are all that tells of its other heads.
    """
    base = model_class._base_class
    module = Path(MODELING_FILE).stem
    classes = {name: PREFIX + cls.__name__ for name, cls in auto_classes(base.config_class).items()}
    classes.setdefault("AutoModelForCausalLM" if "CausalLM" in base.__name__ else "AutoModel", model_class.__name__)
    entries = {"AutoConfig": f"{module}.{PREFIX}{base.config_class.__name__}"}
    entries |= {name: f"{module}.{cls}" for name, cls in classes.items()}
    kept = {name: entry.rpartition("--")[2] for name, entry in (before or {}).items() if isinstance(entry, str)}
    return {name: entry for name, entry in kept.items() if entry.startswith(f"{module}.{PREFIX}")} | entries


def modeling_files(model_class: Any) -> dict[str, str]:
    """Texts of the files that open a condensed model class without this package, by name.

    An architecture that transformers lacks brings its own, self-contained file, put before this one.
    """
    here = Path(__file__)
    texts = {name: here.with_name(name).read_text(encoding="utf-8") for name in IMPORTED_FILES}
    text = here.read_text(encoding="utf-8")
    base = model_class._base_class
    if not base.__module__.startswith("transformers.") and base.__module__ != __name__:
        base_text = Path(str(sys.modules[base.__module__].__file__)).read_text(encoding="utf-8")
        text = base_text + "\n\n" + text.replace("from __future__ import annotations\n", "", 1)
    return {MODELING_FILE: text, **texts}
