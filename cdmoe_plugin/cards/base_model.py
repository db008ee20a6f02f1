"""The name, license and languages that a card copies from the base model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from transformers.utils import cached_file
from yaml import YAMLError

from ..naming import base_checkpoint
from ..tokenizing import revision_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEPT = ("license", "license_name", "license_link", "language")


def describe_base(name_or_path: str, **hub: Any) -> dict[str, Any]:
    """Return the entries of a condensed model's config that describe its base model: `base_model` and `base_card`.

    `base_model` is the name on the hub, or the last part of a local path: the rest of the path is private.

    Args:
        name_or_path (`str`): As in `base_metadata`.
        **hub: As in `base_metadata`.
    """
    name = Path(name_or_path).name if Path(name_or_path).exists() else name_or_path
    return {"base_model": name, "base_card": base_metadata(name_or_path, **hub)}


def remember_base(model: PreTrainedModel, name_or_path: str | os.PathLike, **hub: Any) -> None:
    """Note on a model where it was loaded from, for `recall_base`. Tokens for the hub are not kept."""
    vars(model)["_described_base"] = describe_base(os.fspath(name_or_path), **hub)


def recall_base(model: PreTrainedModel) -> dict[str, Any]:
    """Return `describe_base` of the checkpoint that a model was loaded from."""
    described: dict[str, Any] | None = vars(model).get("_described_base")
    return described or describe_base(base_checkpoint(model), **revision_of(model))


def base_metadata(name_or_path: str, **hub: Any) -> dict[str, Any]:
    """Return the license and the languages in a base model's card; empty without a readable card.

    Args:
        name_or_path (`str`): Local folder or hub name; downloaded if not in the cache.
        **hub: Arguments of `from_pretrained` that locate the checkpoint (`revision`, `cache_dir`, `token`, ...). A card
            in the `subfolder` comes first.
    """
    if not name_or_path:
        return {}
    try:
        places = dict.fromkeys((hub.get("subfolder") or "", ""))
        paths = (_cached_card(name_or_path, {**hub, "subfolder": place}) for place in places)
        path = next(filter(None, paths), None)
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path else {}
    except (OSError, ValueError, YAMLError):  # no such repository, or a header that is not YAML
        return {}
    kept = {name: data[name] for name in _KEPT if data.get(name)}
    link = kept.get("license_link", "")
    if link == "LICENSE" and not Path(name_or_path).exists():  # beside the base model's card, not beside this one
        kept["license_link"] = f"https://huggingface.co/{name_or_path}/blob/{hub.get('revision') or 'main'}/LICENSE"
    elif "://" not in link:
        kept.pop("license_link", None)
    return kept


def _cached_card(name_or_path: str, hub: dict[str, Any]) -> str | None:
    names = ("cache_dir", "force_download", "local_files_only", "revision", "token", "subfolder")
    return cached_file(
        name_or_path,
        "README.md",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **{name: hub[name] for name in names if name in hub},
    )
