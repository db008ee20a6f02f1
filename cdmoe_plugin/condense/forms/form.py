"""The interface of a form, and the base class of forms that replace the sparse block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...blocks import SparseBlock
from ...decoder.stream import LayerStream
from ...decoder.whole import LayerOutput
from ...model.layers_cdmoe import Trimmed
from ...plan import CondensedLayer, CondensePlan
from ..apply import become_condensed, layer_spec
from ..place import install, standing_in


class Form(ABC):
    """The form that chosen decoder layers take.

    Attributes:
        name (`str`): Its name in `CondenseConfig.form` and in plans.
        keeps_experts (`bool`): Whether layers keep some of their experts, which are then searched and may be refitted.
    """

    name: ClassVar[str]
    keeps_experts: ClassVar[bool] = False

    @abstractmethod
    def check(
        self, model: PreTrainedModel, blocks: Sequence[SparseBlock], layers: Sequence[int] | None, num_layers: int = 1
    ) -> None:
        """Check that layers of a model can take this form; the model may be on the meta device.

        Args:
            model (`PreTrainedModel`): A sparse model.
            blocks (`Sequence[SparseBlock]`): Its sparse blocks.
            layers (`Sequence[int]`, *optional*): The decoder layers; None before a search, which may choose any.
            num_layers (`int`, defaults to 1): Number of layers that a search will choose.

        Raises:
            UnsupportedModelError: naming the layers and the reason.
        """

    def check_layers(  # noqa: B027  (most forms have nothing to check)
        self, blocks: Sequence[SparseBlock], layers: Sequence[CondensedLayer]
    ) -> None:
        """Check that layers of a plan can take this form with the experts that they keep.

        Raises:
            ValueError: naming the layer and the reason.
        """

    @abstractmethod
    def variant(self, stream: LayerStream, block: SparseBlock, kept: CondensedLayer) -> AbstractContextManager[None]:
        """Give one layer of a model this form inside the context."""

    @abstractmethod
    def entering(self, stream: LayerStream, block: SparseBlock, inputs: LayerOutput, batch: int) -> Tensor:
        """Compute the input `[B, S, H]` of the part of a layer that this form replaces.

        Args:
            stream (`LayerStream`): The unmodified model.
            block (`SparseBlock`): The layer's sparse block.
            inputs (`LayerOutput`): The layer's input.
            batch (`int`): Index of the input's batch.
        """

    @abstractmethod
    def apply(
        self,
        model: PreTrainedModel,
        blocks: Sequence[SparseBlock],
        plan: CondensePlan,
        mlps: Mapping[int, nn.Module] | None = None,
    ) -> None:
        """Give the layers of a plan this form, in place.

        Args:
            model (`PreTrainedModel`): A sparse model.
            blocks (`Sequence[SparseBlock]`): Its sparse blocks.
            plan (`CondensePlan`): A plan of this form that fits the model.
            mlps (`Mapping[int, nn.Module]`, *optional*): Refitted MLPs by decoder layer, in place of folded ones.

        Raises:
            UnsupportedModelError: if the layers can't take this form. The model is then unchanged.
        """

    @abstractmethod
    def sketch(
        self,
        model: PreTrainedModel,
        blocks: Sequence[SparseBlock],
        kept: Mapping[int, int],
        routed: Mapping[int, list[int]] | None = None,
    ) -> None:
        """Give a model on the meta device the sizes that it would have with these numbers of experts.

        Args:
            model (`PreTrainedModel`): A sparse model on the meta device.
            blocks (`Sequence[SparseBlock]`): Its sparse blocks.
            kept (`Mapping[int, int]`): Number of kept experts by decoder layer.
            routed (`Mapping[int, list[int]]`, *optional*): The experts that stay behind the router, by decoder layer.
        """


class Replacing(Form):
    """A form that replaces a layer's sparse block by another module. The model becomes a condensed one.

    A checkpoint can be opened in this form without reading the experts that are not kept.
    """

    @abstractmethod
    def module(self, block: SparseBlock, kept: CondensedLayer) -> nn.Module:
        """Make the module that replaces a sparse block."""

    def stored_module(self, model: PreTrainedModel, block: SparseBlock, kept: CondensedLayer) -> nn.Module:
        """Make the same module, offloaded if the block is."""
        return self.module(block, kept)

    def variant(self, stream: LayerStream, block: SparseBlock, kept: CondensedLayer) -> AbstractContextManager[None]:
        return standing_in(stream.model, block, self.module(block, kept))

    def entering(self, stream: LayerStream, block: SparseBlock, inputs: LayerOutput, batch: int) -> Tensor:
        # A layer without its MLP returns the input of its MLP's norm, whatever the norms of the architecture.
        with standing_in(stream.model, block, Trimmed()):
            return stream.run_layer(block.layer, inputs, batch)[0]

    def apply(
        self,
        model: PreTrainedModel,
        blocks: Sequence[SparseBlock],
        plan: CondensePlan,
        mlps: Mapping[int, nn.Module] | None = None,
    ) -> None:
        self.check(model, blocks, [layer.layer for layer in plan.layers])
        self.check_layers(blocks, plan.layers)
        parameters_before = model.num_parameters()
        specs = self.install(model, blocks, plan.layers, mlps=mlps)
        become_condensed(model, plan, specs, len(specs) == len(blocks), parameters_before)

    def install(
        self,
        model: PreTrainedModel,
        blocks: Sequence[SparseBlock],
        layers: Sequence[CondensedLayer],
        at_once: bool = True,
        mlps: Mapping[int, nn.Module] | None = None,
    ) -> dict[int, dict[str, Any]]:
        """Replace the sparse blocks of these layers; return their specs for config.json by decoder layer.

        Args:
            model (`PreTrainedModel`): A sparse model.
            blocks (`Sequence[SparseBlock]`): Its sparse blocks.
            layers (`Sequence[CondensedLayer]`): Layers of a plan.
            at_once (`bool`, defaults to `True`): Whether all modules are made before the first is installed, so that
                the model is unchanged after an error. One after the other needs less memory.
            mlps (`Mapping[int, nn.Module]`, *optional*): As for `apply`.
        """
        by_layer = {block.layer: block for block in blocks}
        chosen = ((by_layer[kept.layer], kept) for kept in layers)
        made = ((b, mlps[b.layer] if mlps is not None else self.stored_module(model, b, k)) for b, k in chosen)
        specs = {}
        for block, module in list(made) if at_once else made:
            install(model, block, module)
            specs[block.layer] = layer_spec(block, module)
        return specs

    def sketch(
        self,
        model: PreTrainedModel,
        blocks: Sequence[SparseBlock],
        kept: Mapping[int, int],
        routed: Mapping[int, list[int]] | None = None,
    ) -> None:
        model.name_or_path = ""  # so that the base model's card is not read
        rows = []
        for layer, number in kept.items():
            stay = (routed or {}).get(layer)
            rows.append(CondensedLayer(layer, list(range(number)), [1.0] * number, routed=stay))
        self.apply(model, blocks, CondensePlan(rows, form=self.name))
