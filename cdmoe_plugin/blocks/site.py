"""A place in a model with stacked expert weights."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .text_decoder import decoder_layers
from .weights import read_gated_mlp


class Site:
    """A module with stacked expert weights and its surroundings.

    Args:
        model (`PreTrainedModel`): The whole model.
        experts_name (`str`): Name of the module in the base model, such as "layers.3.mlp.experts".
        experts (`nn.Module`): The module.
    """

    def __init__(self, model: PreTrainedModel, experts_name: str, experts: nn.Module) -> None:
        self.model = model
        self.experts_name = experts_name
        self.experts = experts
        # Changed if a quirk says so, see `Quirk.experts_are_block`.
        self.path = experts_name.rpartition(".")[0]

    @property
    def is_block(self) -> bool:
        """Whether the module with the expert weights is the whole block."""
        return self.path == self.experts_name

    @cached_property
    def config(self) -> Any:
        """The config of the text decoder."""
        return self.model.config.get_text_config()

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @cached_property
    def layer(self) -> int:
        """The index of the decoder layer."""
        return int(self.experts_name.removeprefix(f"{decoder_layers(self.model)}.").partition(".")[0])

    @property
    def owner_name(self) -> str | None:
        """The name of the decoder layer if the block is a direct child of one, otherwise None."""
        match = re.fullmatch(r"(?P<layer>.*?\.\d+)\.[^.]+", self.path)
        return match["layer"] if match else None

    @property
    def module(self) -> nn.Module:
        """The block."""
        return self.model.base_model.get_submodule(self.path)

    @property
    def children(self) -> dict[str, nn.Module]:
        """The children of the block other than its experts."""
        return {name: child for name, child in self.module.named_children() if child is not self.experts}

    @property
    def neighbours(self) -> dict[str, nn.Module]:
        """The other children of the decoder layer."""
        owner = self.model.base_model.get_submodule(self.owner_name or "")
        return {name: child for name, child in owner.named_children() if child is not self.module}

    @property
    def siblings(self) -> dict[str, nn.Module]:
        """All children of the decoder layer if the module with the expert weights is one of them, otherwise none."""
        layer = re.fullmatch(r"(.*?\.\d+)\.[^.]+", self.experts_name)
        return dict(self.model.base_model.get_submodule(layer[1]).named_children()) if layer else {}

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers among the children of the block."""
        return [child for child in self.children.values() if isinstance(child, nn.Linear)]

    @property
    def shared(self) -> nn.Module | None:
        """The shared expert inside the block, if any."""
        return next((child for child in self.children.values() if read_gated_mlp(child) is not None), None)
