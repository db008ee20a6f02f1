"""Programs other than transformers that read an exported checkpoint: warnings of those that will misread it."""

from __future__ import annotations

from transformers.utils import logging

from .dense_markers import STEP, dense_by_step
from .stock_config import StockModel

logger = logging.get_logger(__name__)


def warn_of_other_readers(described: StockModel) -> None:
    """Name the engines that will misread an exported config, or refuse it, with the field and the reason."""
    config, dense = described.config, set(described.places)
    listed = hasattr(config, "mlp_layer_types") and hasattr(config, "first_k_dense_replace")
    if listed and dense != set(range(config.first_k_dense_replace)):
        logger.warning(
            f"`mlp_layer_types` of the exported config names the dense layers {sorted(dense)}, which its "
            f"`first_k_dense_replace` ({config.first_k_dense_replace}) can't. Programs that read only the "
            "latter will misread this checkpoint."
        )
    if hasattr(config, STEP) and dense != dense_by_step(getattr(config, STEP), config.num_hidden_layers):
        logger.warning(
            f"`moe_layers` of the exported config leaves the layers {sorted(dense)} dense, which its `{STEP}` "
            f"({getattr(config, STEP)}) can't say. vLLM, SGLang, llama.cpp and mlx-lm read only the latter and will "
            "misread this checkpoint: condense all layers, or all but every n-th."
        )
    if getattr(config, "mlp_only_layers", None):
        logger.warning(
            f"`mlp_only_layers` of the exported config names the dense layers {sorted(dense)}. llama.cpp's converter "
            "fails on such a checkpoint (tried with qwen2_moe and qwen3_moe), and SGLang, according to its source "
            "code, takes every layer for a sparse one: it skips the dense weights silently and leaves the experts "
            "uninitialised. vLLM reads it."
        )
