"""The options of `cdmoe estimate` and `cdmoe condense`, beside the fields of `CondenseConfig`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any

from .parsing import help_field

# Fields of `CondenseConfig`: those that decide on sizes, and those that say how calibration data is read.
BUDGET = ("num_layers", "num_experts", "layers", "expert_budget", "form")
READING = ("num_samples", "max_length", "batch_size", "seed")


@dataclass
class EstimateArguments:
    """The options of `cdmoe estimate`, beside those of a search."""

    model_name_or_path: str = help_field("Hub name or folder of the sparse checkpoint (required).", MISSING)
    plan: str | None = help_field(
        "A condense_plan.json (or a condensed checkpoint's folder) to apply instead of a search."
    )
    dtype: str = help_field("Dtype to load the model in, such as bfloat16; auto is the checkpoint's own.", "auto")
    revision: str = help_field("Revision of the checkpoint on the hub.", "main")
    trust_remote_code: bool = help_field("Run code that comes with the checkpoint.", False)

    @property
    def hub(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code or None}


@dataclass
class CondenseArguments(EstimateArguments):
    """The options of `cdmoe condense`, beside those of a search."""

    output_dir: str | None = help_field("Folder for the condensed checkpoint; new or empty. Not needed with --dry_run.")
    calibration: str | None = help_field(
        "Hub dataset or local .txt, .json, .jsonl or .parquet file to search on; C4 if unset."
    )
    state_dir: str | None = help_field(
        "Folder in which the search keeps its results; one that was interrupted goes on from there."
    )
    export_stock: str | None = help_field(
        "Folder for a second checkpoint, one of the base architecture, which opens without this package; new or empty. "
        "If the architecture can't describe such a model, it is refused before the search."
    )
    export_approximate: bool = help_field(
        "With --export_stock: replace shared experts' gates per token, which dense layers do not have, by their means "
        "over the calibration tokens.",
        False,
    )
    dry_run: bool = help_field("Print what `cdmoe estimate` prints, and stop.", False)
    device_map: str | None = help_field("Where to load the model: auto (if unset), cpu, cuda, ...")
    offload_folder: str | None = help_field(
        "Folder for weights that are not in memory, to be deleted afterwards. Without --device_map, decoder layers "
        "stay in the checkpoint's own files, and only condensed layers are written there."
    )
    max_shard_size: str | None = help_field(
        "Size of the saved checkpoint's files, at most: 5GB if unset, 1GB with --offload_folder."
    )


GROUPS = {
    "model and plan": ("model_name_or_path", "plan", "revision", "trust_remote_code"),
    "output": ("output_dir", "max_shard_size", "export_stock", "export_approximate", "dry_run"),
    "budget": BUDGET,
    "search": ("expert_selection", "layer_selection", "metric", "compare", "gates", "state_dir", "cache_memory"),
    "refit": ("refit", "refit_target", "refit_steps"),
    "calibration data": ("calibration", *READING),
    "memory": ("dtype", "device_map", "offload_folder"),
}
