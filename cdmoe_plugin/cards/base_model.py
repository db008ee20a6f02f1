"""The name, license and languages that a card copies from the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.utils import cached_file
from yaml import YAMLError

_KEPT = ("license", "license_name", "license_link", "language")


def describe_base(name_or_path: str) -> dict[str, Any]:
    """Return the entries of a condensed model's config that describe its base model: `base_model` and `base_card`.

    `base_model` is the name on the hub, or the last part of a local path: the rest of the path is private.
    """
    name = Path(name_or_path).name if Path(name_or_path).exists() else name_or_path
    return {"base_model": name, "base_card": base_metadata(name_or_path)}


def base_metadata(name_or_path: str) -> dict[str, Any]:
    """Return the license and the languages in a base model's card; empty without a readable card.

    Args:
        name_or_path (`str`): Local folder or hub name; downloaded if not in the cache.
    """
    if not name_or_path:
        return {}
    try:
        path = cached_file(
            name_or_path,
            "README.md",
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path else {}
    except (OSError, ValueError, YAMLError):  # no such repository, or a header that is not YAML
        return {}
    kept = {name: data[name] for name in _KEPT if data.get(name)}
    link = kept.get("license_link", "")
    if link == "LICENSE" and not Path(name_or_path).exists():  # beside the base model's card, not beside this one
        kept["license_link"] = f"https://huggingface.co/{name_or_path}/blob/main/LICENSE"
    elif "://" not in link:
        kept.pop("license_link", None)
    return kept
