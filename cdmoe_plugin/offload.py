"""Offloaded models, in which accelerate's hooks load a module's weights when it is called.

`device_map` with "disk" (or "cpu" beside a GPU) attaches the hooks when a model is loaded. A search calls each decoder
layer many times and reads its weights, so the functions here keep the weights of one layer in memory meanwhile.
"""

from __future__ import annotations

import copy
import ctypes
import os
import re
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
    """Keep the weights of an offloaded module and its submodules on their execution device; others are unaffected."""
    with ExitStack() as stack:
        for part in module.modules():
            for hook in offloading_hooks(part):
                hook.pre_forward(part)
                hook.offload = False
                stack.callback(_offload_again, part, hook)
        yield


def _offload_again(part: nn.Module, hook: AlignDevicesHook) -> None:
    hook.offload = True
    hook.post_forward(part, None)


def offloading_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """Return accelerate's hooks that load this module's own weights when it is called."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]


def weights_source(hook: AlignDevicesHook) -> Any:
    """Return the mapping from which a hook loads weights, without the prefix that the hook may add to names."""
    weights: Any = hook.weights_map
    return getattr(weights, "dataset", weights)


def is_offloaded(module: nn.Module) -> bool:
    """Return whether weights of a module or of its submodules are offloaded."""
    return any(offloading_hooks(part) for part in module.modules())


def is_on_disk(module: nn.Module) -> bool:
    """Return whether weights of a module or of its submodules are read from the disk when it is called."""
    hooks = [hook for part in module.modules() for hook in offloading_hooks(part)]
    return any(_folder(hook) is not None or _checkpoint(hook) is not None for hook in hooks)


def unreachable(model: nn.Module) -> list[str]:
    """Return the names of parameters on the meta device that no hook loads."""
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if not offloading_hooks(module)
        for parameter, tensor in module.named_parameters(recurse=False)
        if tensor.is_meta
    ]


def in_memory_copy(module: nn.Module) -> nn.Module:
    """Copy a module with all its weights in memory."""
    with in_memory(module):
        return copy_without_hooks(module)


def copy_without_hooks(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a module, with the memo of `copy.deepcopy`, and take off the hooks of the copy.

    accelerate leaves a module's `forward` behind as an attribute of itself, a cycle that would keep the copy's weights
    in memory until Python collects garbage.
    """
    found = remove_hook_from_module(copy.deepcopy(module, memo), recurse=True)
    for part in found.modules():
        if getattr(vars(part).get("forward"), "__func__", None) is type(part).forward:
            del part.forward
    return found


def weight_of(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return the weight of an entry of a model's state dict, loaded first if it is offloaded."""
    if not tensor.is_meta:
        return tensor
    parent, _, own = name.rpartition(".")
    module = model.get_submodule(parent)
    with in_memory(module):
        return getattr(module, own).detach()


def offload_like(module: nn.Module, example: nn.Module, name: str) -> None:
    """Offload a new module to the place of another module's weights. Does nothing if these are in memory.

    Args:
        module (`nn.Module`): The new module.
        example (`nn.Module`): A module that accelerate may have offloaded, to the disk or the CPU.
        name (`str`): Name of a new file beside the other weights on disk.
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


def checkpoint_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return an offloaded model's weights under the names of its checkpoint, or None if their source has no such names.

    The first are in memory, the others are read when indexed with `...`.

    A source has them if it has a method `checkpoint_state`, as `loading.layers_on_disk.CheckpointLayers`.
    """
    for module in model.modules():
        for hook in offloading_hooks(module):
            source = _checkpoint(hook)
            if source is not None:
                return source.checkpoint_state(model)
    return None


def refuse_replacing(model: nn.Module, folder: str | os.PathLike, replaced: re.Pattern[str]) -> None:
    """Refuse to save a model over the files from which its offloaded weights are read.

    Args:
        model (`nn.Module`): The model, offloaded or not.
        folder (`str` or `os.PathLike`): The folder in which files will be replaced.
        replaced (`re.Pattern`): Their names.

    Raises:
        ValueError: naming a file that the model would lose.
    """
    target = Path(folder).resolve()
    for file in sorted(_files_in_use(model)):
        if replaced.fullmatch(file.name) and target in (file.parent.resolve(), file.resolve().parent):
            raise ValueError(
                f"`save_directory` {folder} has the file {file.name}, from which the model's offloaded weights are "
                "read. Choose another folder."
            )


def _files_in_use(model: nn.Module) -> set[Path]:
    sources = {id(s): s for part in model.modules() for s in map(weights_source, offloading_hooks(part))}
    files: set[Path] = set()
    for source in sources.values():
        index: Any = getattr(source, "index", None) or {}
        files |= {Path(entry["safetensors_file"]) for entry in index.values() if "safetensors_file" in entry}
        # A checkpoint's own files, as of `loading.layers_on_disk.CheckpointLayers`.
        files |= {Path(file) for file in getattr(getattr(source, "state_dict", None), "files", ())}
    return files


def release_freed_memory() -> None:
    """Return freed memory to the system, if the C library can: glibc keeps pieces between those in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _checkpoint(hook: AlignDevicesHook) -> Any:
    """Return the checkpoint from which a hook reads weights, as `CheckpointLayers`; None if they are elsewhere."""
    source: Any = getattr(weights_source(hook), "state_dict", None)
    return source if hasattr(source, "checkpoint_state") else None


def _folder(hook: AlignDevicesHook) -> Path | None:
    """Return the folder of a hook's weights on disk; None if they are in the CPU's memory."""
    weights = weights_source(hook)
    return Path(weights.save_folder) if getattr(weights, "save_folder", None) else None
