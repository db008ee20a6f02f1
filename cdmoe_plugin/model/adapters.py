"""Adapters of PEFT that are not merged into a model's weights, which are refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from ..atomic import read_json
from ..checks import read_mapping

# Arguments of `from_pretrained` that locate a file.
_LOCATING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_QUIET = dict.fromkeys(
    (
        "_raise_exceptions_for_gated_repo",
        "_raise_exceptions_for_missing_entries",
        "_raise_exceptions_for_connection_errors",
    ),
    False,
)


def refuse_adapters(model: Any) -> None:
    """Refuse a model with adapters of PEFT: condensing would fold, and saving would drop, weights below them.

    Args:
        model: A `PreTrainedModel`, also with adapters of its own or from inside a `PeftModel`; or a `PeftModel`.

    Raises:
        ValueError: naming the adapters and how to merge them.
    """
    if not isinstance(model, nn.Module):
        return
    found = [(name, module) for name, module in model.named_modules() if _is_of_peft(module)]
    if not found and not getattr(model, "_hf_peft_config_loaded", False):
        return
    configs = getattr(model, "peft_config", None)
    names = set(configs) if isinstance(configs, Mapping) else set()
    layers = [(name, module) for name, module in found if hasattr(module, "_get_available_adapters")]
    for _, module in layers:
        names |= set(module._get_available_adapters())
    named = ", ".join(map(repr, sorted(map(str, names))))
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"The model has adapters ({named}) that learn a prompt, which can't be merged into the weights. Pass "
            "`peft_model.get_base_model()` to go on without them."
        )
    where = f", as in {layers[0][0]}" if layers else ""
    if not named:
        raise ValueError(f"Adapters were deleted from the model, but their layers are left{where}: open it again.")
    if layers and all(
        "cdmoe_mlp" in module.adapter_layer_names or not module.adapter_layer_names for _, module in layers
    ):
        raise ValueError(
            f"The model has condense adapters ({named}{where}): condensed layers beside its sparse blocks. "
            "`peft_model.unload()` returns the sparse model, and `peft_model.merge_and_unload()` the condensed one."
        )
    raise ValueError(
        f"The model has adapters ({named}{where}) that are not merged into its weights. Merge them first: "
        "`model = peft_model.merge_and_unload()`; for adapters that transformers has put on the model, "
        "`PeftModel.from_pretrained(base_model, adapter_folder).merge_and_unload()`."
    )


def _is_of_peft(module: nn.Module) -> bool:
    """Return whether a module's class comes from PEFT, which is not imported for it."""
    return any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__)


def refuse_adapter_files(path: str | os.PathLike, hub: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is an adapter, or has an adapter beside its weights; only its configs are read.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder.
        hub (`Mapping[str, Any]`): Arguments of `from_pretrained`, such as `revision`.

    Raises:
        ValueError: naming the adapter, its base model and how to merge them.
    """
    located = {name: hub[name] for name in _LOCATING if hub.get(name) is not None}
    file = find_adapter_config_file(os.fspath(path), **located)
    if file is None:
        return
    try:
        values = read_mapping(read_json(file), ADAPTER_CONFIG_NAME)
    except ValueError as error:
        raise ValueError(f"{path} has an {ADAPTER_CONFIG_NAME} that can't be read: {error}") from error
    base = values.get("base_model_name_or_path") or "a base model that it does not name"
    kind = f"{values.get('peft_type') or 'unknown'} adapter for {base}"
    if cached_file(os.fspath(path), CONFIG_NAME, **located, **_QUIET) is None:
        if "num_virtual_tokens" in values:
            raise ValueError(
                f"{path} is not a model, but a {kind}: a prompt, which can't be merged. Condense the base."
            )
        if values.get("peft_type") == "CDMOE":
            raise ValueError(f"{path} is not a model, but a {kind}: use `condense_pretrained(base, plan={path!r})`.")
        raise ValueError(
            f"{path} is not a model, but a {kind}. Merge it into that model and condense the result: "
            f"`AutoPeftModelForCausalLM.from_pretrained({os.fspath(path)!r}).merge_and_unload()"
            '.save_pretrained("merged")`.'
        )
    raise ValueError(
        f"{path} has adapter files beside its weights ({ADAPTER_CONFIG_NAME}: {kind}), and transformers puts the "
        "adapter on the model when it opens it. Move the adapter files to a folder of their own and merge them: "
        '`PeftModel.from_pretrained(base_model, adapter_folder).merge_and_unload().save_pretrained("merged")`. Without '
        "them, this folder is condensed as it is."
    )


def refuse_left_adapter(folder: str | os.PathLike) -> None:
    """Refuse to save a model into a folder with an adapter, which transformers would put on the model when it opens it.

    Raises:
        ValueError: naming the file.
    """
    file = Path(folder, ADAPTER_CONFIG_NAME)
    if file.is_file():
        raise ValueError(
            f"`save_directory` {folder} has an adapter in it ({ADAPTER_CONFIG_NAME}), which transformers would put on "
            "the saved model when it opens it. Choose another folder, or move the adapter files out of this one."
        )
