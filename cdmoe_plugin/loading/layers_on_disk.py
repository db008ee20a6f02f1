"""Decoder layers offloaded to the checkpoint's own files, from which each is read when its weights are needed.

accelerate's hooks take a module's weights from a mapping by name. transformers fills it with copies on disk of all
weights that it converts, in particular the experts; the mapping here needs no copies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import patch_environment
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from ..blocks import has_stacked_weights, shrink_experts
from ..offload import offloading_hooks, release_freed_memory, weight_of, weights_source
from .ahead import ReadAhead
from .places import Stored, numbered_experts, some_experts, without_experts
from .tensors import Unread

# Number of experts that are read and stacked together.
_AT_ONCE = 8


class CheckpointLayers(Mapping[str, Tensor]):
    """The weights of decoder layers by their names in the model, with one layer in memory at a time.

    While it is in use, the next one is read from the disk into the system's file cache, see `ahead.ReadAhead`.

    Args:
        sketch (`PreTrainedModel`): The model on the meta device, into which each layer is read.
        layers_path (`str`): Name of the list of decoder layers in the model, such as "model.layers".
        stored (`Mapping[str, Stored]`): The tensors of the checkpoint and their places.
        load (`Callable`): The model class's `_load_pretrained_model`.
        load_config: transformers' settings for it.
    """

    def __init__(
        self, sketch: PreTrainedModel, layers_path: str, stored: Mapping[str, Stored], load: Any, load_config: Any
    ) -> None:
        self.sketch = sketch
        self.prefix = f"{layers_path}."
        self.load = load
        self.load_config = replace(load_config, device_map={"": "cpu"}, disk_offload_folder=None)
        self.stored: dict[int, dict[str, Stored]] = {}
        for key, each in stored.items():
            if each.place.layer is not None:
                self.stored.setdefault(each.place.layer, {})[key] = each
        names = (name for name, _ in sketch.named_parameters())
        self.names = dict.fromkeys(name for name in names if name.startswith(self.prefix))
        self.ahead = ReadAhead({i: [each.tensor for each in stored.values()] for i, stored in self.stored.items()})
        self._layer: int | None = None
        self._weights: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        layer = int(name.removeprefix(self.prefix).partition(".")[0])
        if layer != self._layer:
            self.release()  # before the next layer is read
            self.ahead.wait()
            self._weights = self._read(layer)
            self._layer = layer
            self.ahead.start(layer + 1 if layer + 1 in self.stored else min(self.stored))
        return self._weights[name]

    def release(self) -> None:
        """Free the layer in memory, if any; it is read again when needed."""
        self._layer, self._weights = None, {}
        release_freed_memory()

    @property
    def files(self) -> set[str]:
        """The checkpoint's files that layers are read from."""
        tensors = (each.tensor for layer in self.stored.values() for each in layer.values())
        return {file for tensor in tensors for file in tensor.files}

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def checkpoint_state(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Unread]]:
        """Return the model's weights under the names of its checkpoint.

        Unchanged decoder layers are taken from the checkpoint's own files: converted from the model's form, they would
        be in memory twice.

        Returns:
            Weights in memory, and those of unchanged decoder layers, in the dtype of the model's.
        """
        changed = {int(layer) for layer in (getattr(model.config, "condense_config", None) or {})["condensed_layers"]}
        kept = {layer: stored for layer, stored in self.stored.items() if layer not in changed}
        own = {
            name: weight_of(model, name, tensor)
            for name, tensor in model.state_dict().items()
            if not name.startswith(tuple(f"{self.prefix}{layer}." for layer in kept))
        }
        self.release()
        weights = self.sketch.state_dict()
        unread = {
            key: each.tensor.to(weights[each.place.name].dtype)
            for stored in kept.values()
            for key, each in stored.items()
            if each.place.known
        }
        return revert_weight_conversion(model, own), unread

    def _read(self, layer: int) -> dict[str, Tensor]:
        stored = self.stored[layer]
        numbers = numbered_experts(stored)
        module = self.sketch.get_submodule(f"{self.prefix}{layer}")
        # No progress bar for every layer, and no threads: they convert several weights at once, each with twice its
        # memory, and transformers has no argument to switch them off.
        with no_progress_bars(), patch_environment(HF_DEACTIVATE_ASYNC_LOAD=1):
            whole = self._read_experts(module, stored, numbers) if numbers else {}
            self.load(self.sketch, without_experts(stored), None, self.load_config)
        weights = {name: parameter.detach() for name, parameter in module.named_parameters()} | whole
        module.to("meta")
        return {f"{self.prefix}{layer}.{name}": weight for name, weight in weights.items()}

    def _read_experts(
        self, module: nn.Module, stored: Mapping[str, Stored], numbers: Sequence[int]
    ) -> dict[str, Tensor]:
        """Stack the weights of experts that are stored one by one, a few at a time.

        transformers would need twice the memory of all experts or more.
        """
        path, experts = next((name, m) for name, m in module.named_modules() if has_stacked_weights(m))
        prefix = f"{path}." if path else ""
        whole: dict[str, Tensor] = {}
        shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in experts.named_parameters()}
        for start in range(0, len(numbers), _AT_ONCE):
            some = numbers[start : start + _AT_ONCE]
            shrink_experts(experts, len(numbers), len(some))
            self.load(self.sketch, some_experts(stored, some), None, self.load_config)
            for name, parameter in experts.named_parameters():
                if not parameter.is_meta:
                    if name not in whole:
                        whole[name] = torch.empty(shapes[name][0], dtype=shapes[name][1])
                    rows = len(parameter) // len(some)
                    whole[name][start * rows :][: len(parameter)] = parameter.detach()
            shrink_experts(experts, len(some), len(numbers))
        return {prefix + name: weight for name, weight in whole.items()}


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch transformers' progress bars off inside the context."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_but_layers(
    model: PreTrainedModel, layers_path: str, stored: Mapping[str, Stored], load: Any, load_config: Any
) -> tuple[Any, CheckpointLayers]:
    """Load all weights of a model except those of its decoder layers.

    Args:
        model (`PreTrainedModel`): The model on the meta device.
        layers_path (`str`), stored (`Mapping[str, Stored]`), load, load_config: As for `CheckpointLayers`.

    Returns:
        transformers' loading info on the whole checkpoint, and the layers.
    """
    sketch = copy.deepcopy(model)
    # On the meta device nothing is read, but missing and mismatched keys are found.
    shapes = {
        key: torch.empty(each.tensor.shape, dtype=each.tensor.torch_dtype, device="meta")
        for key, each in stored.items()
    }
    on_meta = replace(load_config, device_map={"": "meta"}, disk_offload_folder=None)
    with no_progress_bars():
        info, _ = load(sketch, shapes, None, on_meta)
    # Hooks do not load buffers.
    buffers = {name for name, _ in sketch.named_buffers()}
    now = {key: each.tensor for key, each in stored.items() if each.place.layer is None or each.place.name in buffers}
    load(model, now, None, replace(load_config, device_map=_in_memory(load_config.device_map)))
    layers = CheckpointLayers(sketch, layers_path, stored, load, load_config)
    # The conversions that saving has to revert.
    model._weight_conversions = sketch._weight_conversions
    return info, layers


def _in_memory(device_map: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "cpu" if device == "disk" else device for name, device in device_map.items()}


def bring_from(model: PreTrainedModel, layers: CheckpointLayers) -> None:
    """Make accelerate's hooks take the weights of decoder layers from the checkpoint."""
    for module in model.modules():
        for hook in offloading_hooks(module):
            weights_source(hook).state_dict = layers
