"""Models whose weights are not all in memory: accelerate's hooks bring a module's weights when it is called.

`device_map` with "disk" (or "cpu" beside a GPU) attaches them as a model is loaded. A search calls each decoder layer
many times and reads its weights, so here the weights of one layer are held for as long as they are needed.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import cpu_offload
from accelerate.hooks import (
    AlignDevicesHook,
    SequentialHook,
    add_hook_to_module,
    attach_align_device_hook,
    remove_hook_from_module,
)
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import save_file
from torch import Tensor, nn


@contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Holds the weights of an offloaded module, and of all in it, on the device where they compute.

    Does nothing where they are there already.
    """
    with ExitStack() as stack:
        for part in module.modules():
            for hook in offloading_hooks(part):
                hook.pre_forward(part)
                hook.offload = False
                stack.callback(_let_go, part, hook)
        yield


def _let_go(part: nn.Module, hook: AlignDevicesHook) -> None:
    hook.offload = True
    hook.post_forward(part, None)


def offloading_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """accelerate's hooks that bring this module's own weights when it is called."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]


def weights_source(hook: AlignDevicesHook) -> Any:
    """Where a hook takes a module's weights from; what the hook itself has may add a prefix to their names."""
    weights: Any = hook.weights_map
    return getattr(weights, "dataset", weights)


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights of a module, or of any in it, come when they are needed."""
    return any(offloading_hooks(part) for part in module.modules())


def unreachable(model: nn.Module) -> list[str]:
    """Names of parameters that are on the meta device, and that no hook brings from anywhere."""
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if not offloading_hooks(module)
        for parameter, tensor in module.named_parameters(recurse=False)
        if tensor.is_meta
    ]


def in_memory_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with all its weights."""
    with in_memory(module):
        return remove_hook_from_module(copy.deepcopy(module), recurse=True)


def weight_of(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """An entry of a model's state dict, read from where it is offloaded to if need be."""
    if not tensor.is_meta:
        return tensor
    parent, _, own = name.rpartition(".")
    module = model.get_submodule(parent)
    with in_memory(module):
        return getattr(module, own).detach()


def offload_like(module: nn.Module, example: nn.Module, name: str) -> None:
    """Offloads a new module to where the weights of another one are; does nothing if these are in memory.

    Args:
        module (`nn.Module`): What is offloaded.
        example (`nn.Module`): A module that accelerate offloaded, to the disk or the CPU.
        name (`str`): Of a new file beside the other weights on disk.
    """
    hooks = [hook for part in example.modules() for hook in offloading_hooks(part)]
    if not hooks:
        return
    device = hooks[0].execution_device
    folder = _folder(hooks[0])
    if folder is None:
        cpu_offload(module, device)
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = str(folder / f"{name}.safetensors")
    weights = {key: tensor.detach().contiguous() for key, tensor in module.state_dict().items()}
    save_file(weights, file)
    index = {key: {"safetensors_file": file, "weight_name": key} for key in weights}
    on_disk = OffloadedWeightsLoader(save_folder=str(folder), index=index)
    add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
    attach_align_device_hook(module, device, offload=True, weights_map=on_disk)


def checkpoint_state(model: nn.Module) -> dict[str, Tensor] | None:
    """A model's weights by the names of its checkpoint, where the source of offloaded weights can give them.

    A source can if it has a method `checkpoint_state`, as `loading.layers_on_disk.CheckpointLayers` does.
    """
    for module in model.modules():
        for hook in offloading_hooks(module):
            source: Any = getattr(weights_source(hook), "state_dict", None)
            if hasattr(source, "checkpoint_state"):
                return source.checkpoint_state(model)
    return None


def release_freed_memory() -> None:
    """Gives the system back what is free between pieces in use, where the C library can (glibc does not by itself)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _folder(hook: AlignDevicesHook) -> Path | None:
    """Where the weights of a hook lie on disk; None if they are in the CPU's memory."""
    weights = weights_source(hook)
    return Path(weights.save_folder) if getattr(weights, "save_folder", None) else None
