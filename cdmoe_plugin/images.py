"""Calibration samples with images, video or sound, as the processor of a multimodal model makes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Columns that a processor makes of images, video and sound, and those that say where they belong.
_MEDIA = re.compile(
    r"pixel_values|pixel_mask|image_|video_|audio_|input_features|feature_attention|aspect_ratio|spatial_shapes|"
    r"pixel_attention|second_per_grid|mm_token_type_ids|token_type_ids"
)
_WITH_MEDIA = re.compile(r"pixel_values|input_features")


def has_media(source: Any) -> bool:
    """Return whether calibration data is a dataset with token ids and the values of images, video or sound."""
    columns = getattr(source, "column_names", None)
    if not isinstance(columns, list):
        return False
    return "input_ids" in columns and any(_WITH_MEDIA.match(name) for name in columns)


def media_samples(dataset: Any, seed: int) -> Iterator[dict[str, Tensor]]:
    """Draw samples of a dataset as inputs of a multimodal model, each a batch of its own.

    They are used whole: a cut could separate an image from its tokens.

    Args:
        dataset: A `Dataset` with the columns of a processor's output, one sequence with its images in each row.
        seed (`int`): Seed of the order.

    Yields:
        `dict[str, Tensor]`: Inputs by name: `input_ids` and `attention_mask` `[1, S]` int64
        without padding, and the others as they are, integers as int64 and numbers as float32.

    Raises:
        ValueError: if a row is not one sequence.
    """
    kept = [name for name in dataset.column_names if name in ("input_ids", "attention_mask") or _MEDIA.match(name)]
    rows = dataset.select_columns(kept)
    streams = not hasattr(rows, "__len__")
    rows = rows.shuffle(seed, **({"buffer_size": 100} if streams else {"keep_in_memory": True}))
    yield from map(_inputs, rows)


def _inputs(row: dict[str, Any]) -> dict[str, Tensor]:
    values = {name: _tensor(value) for name, value in row.items() if value is not None}
    ids = values["input_ids"]
    if ids.ndim > 2 or (ids.ndim == 2 and len(ids) != 1):
        raise ValueError(
            f"A row of the calibration data should be one sequence with its images, but its `input_ids` are of shape "
            f"{list(ids.shape)}."
        )
    length = ids.numel()
    mask = values.pop("attention_mask", torch.ones_like(ids)).reshape(-1).bool()
    inputs = {"attention_mask": torch.ones(1, int(mask.sum()), dtype=torch.int64)}
    for name, value in values.items():
        if value.numel() == length and value.shape in ((length,), (1, length)):  # one for each token
            value = value.reshape(1, -1)[:, mask]
        elif name.endswith("grid_thw"):  # one row for each image
            value = value.reshape(-1, 3)
        inputs[name] = value
    return inputs


def _tensor(value: Any) -> Tensor:
    tensor = torch.as_tensor(value)
    return tensor.float() if tensor.is_floating_point() else tensor.long()
