"""Saving of condensed models, atomically, with the plan, a model card and the code that opens them."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..atomic import replacing_files
from ..cards.card import is_someones_card, write_model_card
from ..offload import checkpoint_state
from ..plan import PLAN_FILE, CondensePlan
from . import layers_cdmoe, modeling_cdmoe
from .bitsandbytes import settle_bitsandbytes
from .modeling_cdmoe import PREFIX, CondensedModelMixin

MODELING_FILE = "modeling_cdmoe.py"


class CheckpointMixin(CondensedModelMixin):
    """A condensed model whose `save_pretrained` writes a checkpoint that opens with this package and without it."""

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

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save the model as `PreTrainedModel.save_pretrained`, with the plan, the modeling files and a model card.

        If saving fails, `save_directory` is unchanged; see `replacing_files`.
        """
        only_adapters = getattr(self, "_hf_peft_config_loaded", False)
        # Under torch.distributed, only the first process writes.
        saves = getattr(self, "should_save_on_this_rank", bool)(is_main_process)
        if only_adapters or not saves or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, is_main_process, **kwargs)
            return
        if any(parameter.is_meta for parameter in self.parameters()):  # offloaded: each shard is assembled in memory
            kwargs.setdefault("max_shard_size", "1GB")
            state_dict = checkpoint_state(self) if kwargs.get("state_dict") is None else None
            if state_dict is not None:
                kwargs |= {"state_dict": state_dict, "save_original_format": False}
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        self.config.auto_map = auto_map(type(self))
        with replacing_files(save_directory, _older_files(kwargs.get("variant")), keep=is_someones_card) as folder:
            for file in modeling_files(type(self)):
                (folder / file.name).write_bytes(file.read_bytes())
            plan = (self.config.condense_config or {}).get("plan")
            if plan is not None:
                text = json.dumps(plan, indent=2, sort_keys=True)
                (folder / PLAN_FILE).write_text(text + "\n", encoding="utf-8")
            write_model_card(self, folder)
            super().save_pretrained(folder, **kwargs)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        """Upload the saved files, as the last step of `push_to_hub` and `save_pretrained(push_to_hub=True)`.

        transformers has just replaced our card with a generic one, and uploads only files that changed since. A card
        in the hub's repository that was written by hand is kept.
        """
        if not getattr(self, "_hf_peft_config_loaded", False):
            if not is_someones_card(Path(working_dir, "README.md")):
                write_model_card(self, Path(working_dir))
            files_timestamps = {}  # all files: the folder is temporary and has nothing but this checkpoint
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)


def auto_classes(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """Map the names of the AutoModel classes that open a config class to the model classes that they open."""
    found = {}
    for auto_name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None)
        if not (isinstance(auto_class, type) and auto_name.startswith("AutoModel")) or mapping is None:
            continue
        if config_class in mapping:
            model_class = mapping[config_class]
            found[auto_name] = model_class[0] if isinstance(model_class, (list, tuple)) else model_class
    return found


def _older_files(variant: str | None) -> re.Pattern[str]:
    """Match files that an earlier save may have left: shards, and the saving code of version 0.1."""
    ending = re.escape(f".{variant}") if variant else ""
    weights = rf"model{ending}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?"
    return re.compile(rf"{weights}|model\.safetensors\.index{ending}\.json|saving_cdmoe\.py")


def auto_map(model_class: Any) -> dict[str, str]:
    """Map auto classes to classes in the modeling files, for `trust_remote_code=True` (`auto_map` in config.json)."""
    base = model_class._base_class
    module = modeling_files(model_class)[-1].stem
    classes = {name: PREFIX + cls.__name__ for name, cls in auto_classes(base.config_class).items()}
    classes.setdefault("AutoModelForCausalLM" if "CausalLM" in base.__name__ else "AutoModel", model_class.__name__)
    entries = {"AutoConfig": f"{module}.{PREFIX}{base.config_class.__name__}"}
    return entries | {name: f"{module}.{cls}" for name, cls in classes.items()}


def modeling_files(model_class: Any) -> list[Path]:
    """List the files that define a condensed model class without this package, the one with the class last."""
    files = [Path(str(module.__file__)) for module in (layers_cdmoe, modeling_cdmoe)]
    base = model_class._base_class
    if not base.__module__.startswith("transformers."):  # an architecture that transformers lacks
        files.append(Path(str(sys.modules[base.__module__].__file__)))
    return files
