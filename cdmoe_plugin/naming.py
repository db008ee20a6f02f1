"""The names of models in memory, by which libraries open a model again.

PEFT writes `name_or_path` into adapter configs, and TRL opens reference models and tokenizers by it. A model that was
condensed in memory must not be taken for the sparse checkpoint that it came from. It therefore gets a name that no
checkpoint can have: hub names with "--" are invalid, and the error that names it says what to do.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from .atomic import STAGING

_ADVICE = "in-memory--save-and-open-it-first"


def leave_base(model: PreTrainedModel, change: str) -> None:
    """Give a changed model a name of its own, and remember the checkpoint that it came from.

    Args:
        model (`PreTrainedModel`): The model, with a config of its own.
        change (`str`): The change, such as "condensed".
    """
    base = model.name_or_path or ""
    vars(model)["_base_checkpoint"] = base
    _rename(model, f"{Path(base).name or type(model).__name__}--{change}-{_ADVICE}")


def take_name(model: PreTrainedModel, saved: str | os.PathLike) -> None:
    """Name a model that was condensed in memory after the folder or hub repository to which it was saved.

    A model that was opened from a checkpoint keeps its name, as in transformers.
    """
    if "_base_checkpoint" in vars(model) and not STAGING.fullmatch(Path(saved).name):
        _rename(model, os.fspath(saved))


def base_checkpoint(model: PreTrainedModel) -> str:
    """Return the checkpoint from which a model was opened, also if it was condensed since; "" without one.

    It has the tokenizer, and the base model's card.
    """
    name = model.name_or_path or ""
    return vars(model).get("_base_checkpoint") or ("" if name.endswith(_ADVICE) else name)


def _rename(model: nn.Module, name: str) -> None:
    for part in model.modules():  # a decoder inside has a name of its own
        if isinstance(part, PreTrainedModel):
            part.name_or_path = part.config._name_or_path = name
