"""A sparse checkpoint opened by transformers, which is given only the tensors that the model needs."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import describe_sparse_blocks, shrink_experts
from ..blocks import layers_path as path_in_base
from ..model.extra import carry
from .auto import text_tensors
from .dequantize import refuse_codes
from .files import refuse_bin
from .layers_on_disk import CheckpointLayers, bring_from, load_but_layers
from .packed import Method, Packed, put_together
from .places import Places, Stored, kept_only, resized_weights
from .tensors import unread_tensors

logger = logging.get_logger(__name__)


@dataclass
class Reading:
    """The request to open a checkpoint, and what was found in it.

    Args:
        sketch (`PreTrainedModel`): The whole model on the meta device.
        method (`tuple[str, Method]`, *optional*): How its weights are dequantised, as `find_method` returns it.
        kept (`dict[int, list[int]]`): The experts to read of these layers; all of others.
        counts (`dict[int, int]`): Numbers of experts of the layers in `kept`.
        keep_extra (`bool`): Whether weights for which the model has no place are carried over.
        text_only (`bool`): Whether only the text model in a multimodal checkpoint is read.
        on_disk (`bool`): Whether decoder layers stay in the checkpoint's files.
        layers (`CheckpointLayers`, *optional*): These layers.
        extra (`dict`): The weights that are carried over, read when indexed.
    """

    sketch: PreTrainedModel
    method: tuple[str, Method] | None = None
    kept: dict[int, list[int]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    keep_extra: bool = False
    text_only: bool = False
    on_disk: bool = False
    layers: CheckpointLayers | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def stored(self, files: list[str], model: PreTrainedModel, load_config: Any) -> dict[str, Stored]:
        """List the tensors that the model needs, with their places; set `extra`."""
        path = load_config.pretrained_model_name_or_path
        if not all(str(file).endswith(".safetensors") for file in files):
            raise refuse_bin(path, bool(self.kept), self.on_disk)
        tensors: dict[str, Any] = dict(unread_tensors(files))
        if self.text_only:
            tensors = text_tensors(tensors)
        if self.method is not None:
            name, method = self.method
            tensors = put_together(method, tensors)
            logger.warning(
                f"The weights of {path} are stored quantised ({name}); they are dequantised to "
                f"{str(load_config.dtype).removeprefix('torch.')} while they are read."
            )
        places = Places(model, layers_path(self.sketch), load_config.weight_mapping or ())
        stored = {}
        for key, place in places.of(tensors).items():
            tensor = tensors[key]
            if isinstance(tensor, Packed):
                tensor = tensor.to(places.dtype_of(place) or load_config.dtype)
            stored[key] = Stored(tensor, place)
        refuse_codes(stored, {name: weight.dtype for name, weight in places.weights.items()}, path)
        if self.keep_extra:
            self.extra = {
                key: each.tensor for key, each in stored.items() if not each.place.known and each.place.layer is None
            }
            stored = {key: each for key, each in stored.items() if key not in self.extra}
        return kept_only(stored, resized_weights(model, self.sketch), self.kept, self.counts)


def read_model(path: str | os.PathLike, reading: Reading, model_kwargs: dict[str, Any]) -> PreTrainedModel:
    """Open a sparse checkpoint.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder.
        reading (`Reading`): What is read.
        model_kwargs (`dict`): For `from_pretrained`. With an `offload_folder` and no `device_map`, decoder layers stay
            on disk.

    Raises:
        ValueError: if the checkpoint lacks weights, or is not stored in safetensors.
    """
    sketch = reading.sketch
    reading.on_disk = "offload_folder" in model_kwargs and model_kwargs.get("device_map") is None
    if reading.on_disk:
        model_kwargs = model_kwargs | {"device_map": layers_on_disk(sketch, layers_path(sketch))}
    model_kwargs = dict(model_kwargs)
    reading.text_only = model_kwargs.pop("text_only", False)
    if reading.method is not None or reading.text_only:
        model_kwargs = _with_config(sketch.config, model_kwargs)
    opened: Any = _reader_class(reading).from_pretrained(path, output_loading_info=True, **model_kwargs)
    model, loading_info = opened
    check_whole(model, loading_info)
    model.__class__ = type(sketch)
    if reading.layers is not None:
        bring_from(model, reading.layers)
    # Beside a model in memory they are in memory too: the files may be gone when it is saved.
    carry(model, reading.extra if reading.on_disk else {key: each[...] for key, each in reading.extra.items()})
    return model


def layers_path(sketch: PreTrainedModel) -> str:
    """Return the name of the list of decoder layers in the whole model, such as "model.layers"."""
    layers = sketch.base_model.get_submodule(path_in_base(describe_sparse_blocks(sketch)))
    return next(name for name, module in sketch.named_modules() if module is layers)


def layers_on_disk(sketch: PreTrainedModel, layers_path: str) -> dict[str, str | int]:
    """Make a device map with all decoder layers on disk and the rest on the GPU, or on the CPU without one."""
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else "cpu"
    device_map: dict[str, str | int] = {}
    for name, module in sketch.named_modules():
        prefix = f"{name}." if name else ""
        if f"{layers_path}.".startswith(prefix) and name != layers_path:  # around the layers
            own_weights = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            device_map |= {f"{prefix}{weight}": device for weight, _ in own_weights}
        if name == layers_path:
            device_map |= {f"{name}.{i}": "disk" for i, _ in enumerate(module.children())}
        elif not f"{layers_path}.".startswith(f"{name}.") and not name.startswith(f"{layers_path}."):
            own = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
            if name and (own or not any(True for _ in module.children())):
                device_map[name] = device
    return device_map


def check_whole(model: PreTrainedModel, loading_info: Any) -> None:
    """Check that all weights of a model returned by `from_pretrained` came from the checkpoint.

    Raises:
        ValueError: naming newly initialised weights, about which transformers only warns.
    """
    lost = {str(key) for key in loading_info.get("missing_keys", ())}
    lost |= {str(key[0]) for key in loading_info.get("mismatched_keys", ())}
    if lost:
        some = sorted(lost)[:3]
        raise ValueError(f"The checkpoint {model.name_or_path!r} lacks {len(lost)} of its weights, such as {some}.")


def _with_config(config: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with which `from_pretrained` takes this config, in which no quantisation is left."""
    config, others = copy.deepcopy(config), {}
    for name, value in model_kwargs.items():
        if name in vars(config) and name != "dtype":
            setattr(config, name, value)
        elif name not in ("config", "quantization_config"):
            others[name] = value
    return others | {"config": config}


def _reader_class(reading: Reading) -> type[PreTrainedModel]:
    """Make a subclass of the sketch's class that builds only the kept experts, and reads what `reading` asks for."""
    base = type(reading.sketch)

    def init(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        if not reading.kept:
            return
        for block in describe_sparse_blocks(self):
            if block.layer in reading.kept:
                shrink_experts(block.experts, reading.counts[block.layer], len(reading.kept[block.layer]))

    def load(model: Any, state_dict: Any, files: list[str] | None, load_config: Any, *args: Any) -> Any:
        if files is None:
            return base._load_pretrained_model(model, state_dict, files, load_config, *args)
        stored = reading.stored(files, model, load_config)
        if reading.on_disk:
            found = load_but_layers(
                model, layers_path(reading.sketch), stored, base._load_pretrained_model, load_config
            )
            info, reading.layers = found
            return info, {}
        tensors = {key: each.tensor for key, each in stored.items()}
        return base._load_pretrained_model(model, tensors, None, load_config, *args)

    # With the base's name and module, transformers treats it as the base class.
    namespace = {"__module__": base.__module__, "__init__": init, "_load_pretrained_model": staticmethod(load)}
    return type(base.__name__, (base,), namespace)
