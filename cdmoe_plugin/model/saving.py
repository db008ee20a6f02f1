"""Saving of condensed models, atomically, with the plan, a model card and the code that opens them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..atomic import replacing_files
from ..cards.card import is_someones_card, write_model_card
from ..naming import take_name
from ..offload import checkpoint_state, refuse_replacing
from ..plan import CondensePlan
from ..plan_files import PLAN_FILE
from . import layers_cdmoe, modeling_cdmoe
from .adapters import refuse_left_adapter
from .bitsandbytes import settle_bitsandbytes
from .consistency import check_layers
from .extra import extra_weights, layers_withdrawn
from .modeling_cdmoe import PREFIX, CondensedModelMixin
from .own_code import ENTRY, has_own_code, own_files, own_models, travels
from .router_requests import answer_router_requests
from .shards import add_tensors
from .state_names import use_names_in_memory

MODELING_FILE = "modeling_cdmoe.py"
# The auto classes that open multimodal models as a whole.
MULTIMODAL = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")


class CheckpointMixin(CondensedModelMixin):
    """A condensed model whose `save_pretrained` writes a checkpoint that opens with this package and without it."""

    _auto_class = None  # with the base's, transformers would copy code beside the weights, over ours

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        check_layers(config)
        super().__init__(config, *args, **kwargs)
        made = self.config.condense_config
        if made.get("no_router_loss", made.get("all_condensed")):
            answer_router_requests(self)

    @property
    def condense_plan(self) -> Any:
        """The applied `CondensePlan`, or None if the config has none."""
        plan = super().condense_plan
        if plan is None:
            return None
        try:
            return CondensePlan.from_dict(plan)
        except ValueError as error:
            raise ValueError(f"`condense_config.plan` of this model's config is not a valid plan: {error}") from error

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as `CondensedModelMixin.from_pretrained`, and prepare layers of bitsandbytes."""
        loaded = super().from_pretrained(*args, **kwargs)
        settle_bitsandbytes(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load weights under their names in memory or on disk. `load_state_dict` calls this, also that of a wrapper."""
        use_names_in_memory(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save the model as `PreTrainedModel.save_pretrained`, with the plan, the modeling files and a model card.

        If saving fails, `save_directory` is unchanged; see `replacing_files`. The folder becomes the `name_or_path` of
        a model that was condensed in memory.

        Raises:
            ValueError: if an adapter is in the folder, or a file from which offloaded weights of the model are read.
        """
        only_adapters = getattr(self, "_hf_peft_config_loaded", False)
        replaced = _older_files(kwargs.get("variant"))
        if not only_adapters:
            refuse_left_adapter(save_directory)
            refuse_replacing(self, save_directory, replaced)
        # Under torch.distributed, only the first process writes.
        saves = getattr(self, "should_save_on_this_rank", bool)(is_main_process)
        if only_adapters or not saves or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, is_main_process, **kwargs)
            if not only_adapters:
                take_name(self, save_directory)
            return
        unread: Mapping[str, Any] = {}
        if any(parameter.is_meta for parameter in self.parameters()):  # offloaded: each shard is assembled in memory
            kwargs.setdefault("max_shard_size", "1GB")
            state = checkpoint_state(self) if kwargs.get("state_dict") is None else None
            if state is not None:
                kwargs |= {"state_dict": state[0], "save_original_format": False}
                unread = state[1]
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        before = self.config.__dict__.pop("auto_map", None)
        if entries := auto_map(type(self), before):
            self.config.auto_map = entries
        size, variant = kwargs.get("max_shard_size", "50GB"), kwargs.get("variant")
        self.__dict__["_add_rest"] = partial(
            add_tensors, tensors={**unread, **extra_weights(self)}, max_shard_size=size, variant=variant
        )
        with replacing_files(save_directory, replaced, keep=is_someones_card) as folder, layers_withdrawn(self):
            for name, code in modeling_files(type(self), before).items():
                (folder / name).write_bytes(code)
            plan = (self.config.condense_config or {}).get("plan")
            if plan is not None:
                text = json.dumps(plan, indent=2, sort_keys=True)
                (folder / PLAN_FILE).write_text(text + "\n", encoding="utf-8")
            write_model_card(self, folder)
            super().save_pretrained(folder, **kwargs)
            self._complete(folder)
        take_name(self, save_directory)

    def _complete(self, folder: Path) -> None:
        """Add the tensors that are not among the model's weights in memory to what has just been saved."""
        add_rest = self.__dict__.pop("_add_rest", None)
        if add_rest is not None:
            add_rest(folder)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        """Upload the saved files, as the last step of `push_to_hub` and `save_pretrained(push_to_hub=True)`.

        transformers has just replaced our card with a generic one, and uploads only files that changed since. A card
        in the hub's repository that was written by hand is kept.
        """
        if not getattr(self, "_hf_peft_config_loaded", False):
            self._complete(Path(working_dir))
            if not is_someones_card(Path(working_dir, "README.md")):
                write_model_card(self, Path(working_dir))
            files_timestamps = {}  # all files: the folder is temporary and has nothing but this checkpoint
        uploaded = super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)
        if not getattr(self, "_hf_peft_config_loaded", False):
            take_name(self, repo_id)
        return uploaded


def auto_classes(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """Map the names of the AutoModel classes that open a config class to the model classes that they open.

    `AutoModelForCausalLM` opens some multimodal checkpoints as text alone, and others not at all; here it opens them as
    the whole model, which computes the same on text.
    """
    found: dict[str, Any] = {}
    for auto_name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None)
        if not (isinstance(auto_class, type) and auto_name.startswith("AutoModel")) or mapping is None:
            continue
        if config_class in mapping:
            model_class = mapping[config_class]
            found[auto_name] = model_class[0] if isinstance(model_class, (list, tuple)) else model_class
    found = {name: cls for name, cls in found.items() if getattr(cls, "config_class", config_class) is config_class}
    whole = next((found[name] for name in MULTIMODAL if name in found), None)
    return found if whole is None else {"AutoModelForCausalLM": whole, **found}


def _older_files(variant: str | None) -> re.Pattern[str]:
    """Match files that an earlier save may have left: shards, and the saving code of version 0.1."""
    ending = re.escape(f".{variant}") if variant else ""
    weights = rf"model{ending}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?"
    return re.compile(rf"{weights}|model\.safetensors\.index{ending}\.json|saving_cdmoe\.py")


def auto_map(model_class: Any, before: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Map auto classes to classes in the modeling files, for `trust_remote_code=True` (`auto_map` in config.json).

    Empty for a base whose code does not travel with the weights.

    Args:
        model_class: The condensed model's class.
        before (*optional*): The `auto_map` of the config so far, with the classes of a base with code of its own.
    """
    base = model_class._base_class
    files = list(modeling_files(model_class, before))
    if has_own_code(base.config_class) and f"{ENTRY}.py" not in files:
        return {}
    module = files[-1].removesuffix(".py")
    classes = {name: PREFIX + cls.__name__ for name, cls in _models(base, before).items()}
    if model_class.__name__ not in classes.values():
        classes.setdefault("AutoModelForCausalLM" if "CausalLM" in base.__name__ else "AutoModel", model_class.__name__)
    entries = {"AutoConfig": f"{module}.{PREFIX}{base.config_class.__name__}"}
    return entries | {name: f"{module}.{cls}" for name, cls in classes.items()}


def _models(base: Any, before: Mapping[str, Any] | None) -> dict[str, type]:
    own = own_models(base, before) if has_own_code(base.config_class) else {}
    return {**own, **auto_classes(base.config_class)}


def modeling_files(model_class: Any, before: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """Return the files that define a condensed model class without this package, the one with the class last.

    Args:
        model_class, before (*optional*): As in `auto_map`.
    """
    paths = [Path(str(module.__file__)) for module in (layers_cdmoe, modeling_cdmoe)]
    base = model_class._base_class
    if not has_own_code(base.config_class) and not base.config_class.__module__.startswith("transformers."):
        paths.append(Path(str(sys.modules[base.__module__].__file__)))  # this package's own architecture
    files = {path.name: path.read_bytes() for path in paths}
    if has_own_code(base.config_class) and travels(base):
        files |= own_files([base, base.config_class, *_models(base, before).values()])
    return files
