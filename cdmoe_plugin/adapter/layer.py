"""The tuner layers of a condense adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..loading.adapter_weights import MLPS
from ..model.layers_cdmoe import CondensedMLP
from .mixing import ORDER


class CondenseTunerLayer(BaseTunerLayer):
    """The base class of modules that stand around parts of the sparse model.

    Args:
        base_layer (`nn.Module`): The module in whose place this one is.
    """

    base_layer: nn.Module

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"Only one condense adapter can be active at a time, not {list(adapter_names)}.")
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "A condensed MLP can't be merged into a sparse block, so `merge_adapter()`, which TRL calls for vLLM, is "
            "not supported. `merge_and_unload()` returns the condensed model."
        )

    def unmerge(self) -> None:
        """Do nothing: nothing is ever merged."""

    def unload_and_optionally_merge_module(self, **_kwargs: Any) -> nn.Module:
        """Return the part of the sparse model."""
        return self.base_layer


class CondenseLayer(nn.Module, CondenseTunerLayer):
    """A sparse block and its condensed MLPs by adapter. The MLP of the active adapter is used instead of the block."""

    adapter_layer_names = (MLPS,)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.cdmoe_mlp = nn.ModuleDict()
        self._active_adapter: list[str] = []
        # MLPs without weights so far, until a forward pass has checked them.
        self._unchecked: set[str] = set()
        self.training = base_layer.training

    @property
    def standing_in(self) -> str | None:
        """The adapter whose MLP is used instead of the block; None for the block."""
        names = [name for name in self.active_adapters if name in self.cdmoe_mlp]
        return None if self.disable_adapters or not names else names[0]

    def add(self, name: str, mlp: CondensedMLP, loaded: bool) -> None:
        """Add the MLP of an adapter; without its weights, it raises in `forward` until they are loaded."""
        self.cdmoe_mlp[name] = mlp
        if not loaded:
            self._unchecked.add(name)
            for parameter in mlp.parameters():
                parameter.data.fill_(torch.nan)
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers should not draw it

    def replace(self, name: str, mlp: CondensedMLP) -> None:
        """Replace the MLP of an adapter by another one, in the same dtypes and as trainable as before."""
        before = dict(self.cdmoe_mlp[name].named_parameters())
        for key, parameter in mlp.named_parameters():
            parameter.data = parameter.data.to(before[key].dtype)
            parameter.requires_grad_(before[key].requires_grad)
        self.cdmoe_mlp[name] = mlp
        self._unchecked.discard(name)

    def mlp_of(self, name: str) -> Any:
        """Return the MLP of an adapter.

        Raises:
            ValueError: if its weights were not loaded.
        """
        mlp = self.cdmoe_mlp[name]
        if name in self._unchecked:
            if any(p.is_meta or bool(p.isnan().any()) for p in mlp.parameters()):
                raise ValueError(
                    f"The weights of the adapter {name!r} were not loaded: open it with `PeftModel.from_pretrained`. "
                    "For a new adapter, use `CondenseAdapterConfig(plan=adapter_folder)`, which folds the experts. If "
                    "its plan gives layers numbers of single neurons, call `refit`, which chooses them."
                )
            self._unchecked.discard(name)
        return mlp

    def merged_mlp(self, name: str, dtype: torch.dtype) -> CondensedMLP:
        """Return the MLP of an adapter in a dtype, except for parts that the block has under the same name."""
        mlp = self.mlp_of(name)
        like = {key: parameter.dtype for key, parameter in self.base_layer.named_parameters()}
        for key, parameter in mlp.named_parameters():
            parameter.data = parameter.data.to(like.get(key, dtype))
        return mlp.requires_grad_(True)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the active MLP, or the sparse block if no adapter is active, in the dtype of the input."""
        name = self.standing_in
        if name is None:
            return self.base_layer(hidden_states, *args, **kwargs)
        mlp, dtype = self.mlp_of(name), hidden_states.dtype
        output = mlp(hidden_states.to(mlp.up_proj.weight.dtype), *args, **kwargs)
        return (output[0].to(dtype), *output[1:]) if isinstance(output, tuple) else output.to(dtype)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        here = [p for p in base_layer.parameters() if not p.is_meta and p.is_floating_point()]
        largest = max(here, key=torch.Tensor.numel, default=None)  # routers may be float32
        return (None, None) if largest is None else (largest.device, largest.dtype)


class BesideLayer(nn.Module, CondenseTunerLayer):
    """A router or shared expert of the decoder layer, left out while the block beside it is condensed.

    Args:
        base_layer (`nn.Module`): The router or the shared expert.
        layer (`CondenseLayer`): The block beside it.
        absent (`nn.Module`): The module that is called while the block is condensed.
    """

    def __init__(self, base_layer: nn.Module, layer: CondenseLayer, absent: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._layer = (layer,)  # in a tuple, as it is not a child
        self._absent = (absent,)
        self._active_adapter: list[str] = []
        self.training = base_layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.base_layer if self._layer[0].standing_in is None else self._absent[0]
        return module(*args, **kwargs)


def condense_layers(model: nn.Module) -> list[CondenseLayer]:
    """List the blocks of a model that have condensed MLPs."""
    return [module for module in model.modules() if isinstance(module, CondenseLayer)]


@contextmanager
def unwrapped(model: PreTrainedModel) -> Iterator[None]:
    """Put the parts of the sparse model back in their places inside the context."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, CondenseTunerLayer)]
    with ExitStack() as stack:
        for name, module in found:
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, module.base_layer)
            stack.callback(setattr, owner, child, module)
        yield


def refuse_other_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters of other methods.

    Raises:
        ValueError: with the order in which to use both.
    """
    if any(isinstance(m, BaseTunerLayer) and not isinstance(m, CondenseTunerLayer) for m in model.modules()):
        raise ValueError(ORDER)
