"""Base models with code of their own, which transformers lacks: their files are saved with the condensed weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto import configuration_auto

from .modeling_cdmoe import PREFIX

# The module that makes condensed classes of such a base. It is written beside the files of the base.
ENTRY = "modeling_cdmoe_own"
_TEXT = '''"""The condensed classes of a model whose own code is in the files imported here."""

import sys

{imports}
from .modeling_cdmoe import ClassFactory, CondensedModelMixin

_classes = ClassFactory(__name__, CondensedModelMixin)


def __getattr__(name):
    return _classes.by_name(name, sys.modules[__name__])
'''


def has_own_code(config_class: type) -> bool:
    """Return whether an architecture, known by its config class, is neither of transformers nor of this package."""
    return config_class.__module__.partition(".")[0] not in ("transformers", __package__.partition(".")[0])


def travels(base: Any) -> bool:
    """Return whether the files of a base model with own code are saved, as transformers does with such a model."""
    return is_remote(base) or (base._auto_class is not None and base.__module__ != "__main__")


def own_models(base: Any, auto_map: Mapping[str, Any] | None) -> dict[str, type]:
    """Return the model classes of the code of a base model, by the auto classes that open them.

    Args:
        base: The base model's class.
        auto_map (*optional*): The `auto_map` of its config, or of a condensed model's.
    """
    module = sys.modules[base.__module__]
    names = {name: str(place).rpartition(".")[2].removeprefix(PREFIX) for name, place in (auto_map or {}).items()}
    found = {name: getattr(module, cls, None) for name, cls in names.items() if name.startswith("AutoModel")}
    return {name: cls for name, cls in found.items() if isinstance(cls, type)}


def own_files(classes: list[type]) -> dict[str, bytes]:
    """Return the files that define classes and those they import, by name, and the module of their condensed classes.

    Raises:
        ValueError: if a file is missing, or two have the same name.
    """
    found: dict[str, bytes] = {}
    for cls in classes:
        start = Path(str(sys.modules[cls.__module__].__file__))
        for file in (start, *map(Path, get_relative_import_files(start))):
            text = file.read_bytes()
            if found.setdefault(file.name, text) != text:
                raise ValueError(f"The code of {classes[0].__name__} has two different files named {file.name}.")
    imports = sorted({f"from .{cls.__module__.rpartition('.')[2]} import {cls.__name__}" for cls in classes})
    return {**found, f"{ENTRY}.py": _TEXT.format(imports="\n".join(imports)).encode()}


def check_own_code(base: Any) -> None:
    """Check that a condensed checkpoint of a model could bring along the code that came with the model.

    Args:
        base: The model's class.

    Raises:
        ValueError: if the model type is transformers' own, or if a file with code is missing or another has its name.
    """
    if not is_remote(base):
        return
    model_type = base.config_class.model_type
    if model_type in configuration_auto.CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"{base.__name__} is code that came with the checkpoint, but its `model_type`, {model_type!r}, is one of "
            "transformers' own, as which the condensed checkpoint would be opened. Load it without "
            "`trust_remote_code=True`, so that transformers' own class is used."
        )
    try:
        files = own_files([base, base.config_class])
    except OSError as error:
        raise ValueError(
            f"The code of {base.__name__} should be saved with the condensed checkpoint, but can't be read: {error}"
        ) from error
    clash = sorted(files.keys() & {"modeling_cdmoe.py", "layers_cdmoe.py"})
    if clash:
        raise ValueError(f"The code of {base.__name__} has a file named {clash[0]}, as condensed checkpoints have.")


def is_remote(cls: type) -> bool:
    """Return whether a class came with a checkpoint, by `trust_remote_code=True`."""
    return cls.__module__.startswith("transformers_modules.")
