"""The options of `cdmoe estimate` and `cdmoe condense`, beside the fields of `CondenseConfig`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any

from .parsing import help_field

# Fields of `CondenseConfig`: those that decide on sizes, and those that say how calibration data is read.
BUDGET = ("target_size", "num_layers", "num_experts", "layers", "expert_budget", "num_routed", "form")
READING = ("num_samples", "max_length", "batch_size", "seed")


@dataclass
class EstimateArguments:
    """The options of `cdmoe estimate`, beside those of a search."""

    model_name_or_path: str = help_field("Hub name or folder of the sparse checkpoint (required).", MISSING)
    plan: str | None = help_field(
        "A condense_plan.json (or a condensed checkpoint's folder) to apply instead of a search."
    )
    preset: str | None = help_field(
        "Defaults of the other options, a row of docs/condense.md: best, paper or fast. Those of paper if unset."
    )
    dtype: str = help_field("Dtype to load the model in, such as bfloat16; auto is the checkpoint's own.", "auto")
    revision: str = help_field("Revision of the checkpoint on the hub.", "main")
    trust_remote_code: bool = help_field("Run code that comes with the checkpoint.", False)
    cache_dir: str | None = help_field("Folder for files from the hub; that of huggingface_hub if unset.")
    token: str | None = help_field("Token for the hub; that of `hf auth login` if unset.")
    text_only: bool = help_field(
        "Open only the text model in a multimodal checkpoint; the result is a text model without the vision part.",
        False,
    )

    @property
    def hub(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""
        given = {name: value for name in ("cache_dir", "token") if (value := getattr(self, name)) is not None}
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code or None, **given}


@dataclass
class CondenseArguments(EstimateArguments):
    """The options of `cdmoe condense`, beside those of a search."""

    output_dir: str | None = help_field("Folder for the condensed checkpoint; new or empty. Not needed with --dry_run.")
    calibration: str | None = help_field(
        "Data to search on: a hub dataset (name:config@split), or a local .txt, .json, .jsonl, .parquet, .csv, .tsv or "
        ".arrow file (also compressed) or folder of such files, with texts, chats or token ids; C4 if unset."
    )
    state_dir: str | None = help_field(
        "Folder in which the search keeps its results and the plan; an interrupted search goes on from there. If "
        "unset, OUTPUT_DIR.search, which is removed once the model is saved."
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
    keep_extra: bool = help_field(
        "Carry over the checkpoint's weights for which the model has no place, such as layers for multi-token "
        "prediction.",
        False,
    )
    dequantize: bool = help_field(
        "Dequantise a checkpoint that is published quantised while it is read; if false, it is refused.", True
    )
    dry_run: bool = help_field("Print what `cdmoe estimate` prints, and stop.", False)
    device_map: str | None = help_field("Where to load the model: auto (if unset), cpu, cuda, ...")
    max_memory: list[str] | None = help_field(
        "Memory that the model's weights may take on each device, such as 0=40GiB cpu=100GiB."
    )
    attn_implementation: str | None = help_field(
        "Attention to load the model with: sdpa, eager, flash_attention_2, ..."
    )
    offload_folder: str | None = help_field(
        "Folder for weights that are not in memory, to be deleted afterwards. Without --device_map, decoder layers "
        "stay in the checkpoint's own files, and only condensed layers are written there."
    )
    max_shard_size: str | None = help_field(
        "Size of the saved checkpoint's files, at most: 5GB if unset, 1GB with --offload_folder."
    )


GROUPS = {
    "model and plan": (
        "model_name_or_path",
        "plan",
        "preset",
        "text_only",
        "revision",
        "trust_remote_code",
        "cache_dir",
        "token",
    ),
    "output": ("output_dir", "max_shard_size", "keep_extra", "export_stock", "export_approximate", "dry_run"),
    "budget": BUDGET,
    "search": (
        "expert_selection",
        "routed_selection",
        "layer_selection",
        "layer_search",
        "metric",
        "compare",
        "gates",
        "exportable",
        "state_dir",
        "cache_memory",
    ),
    "refit": ("refit", "refit_neurons", "refit_target", "refit_steps"),
    "calibration data": ("calibration", *READING),
    "memory and speed": (
        "dtype",
        "dequantize",
        "device_map",
        "max_memory",
        "offload_folder",
        "attn_implementation",
    ),
}
