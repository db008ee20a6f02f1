"""The search for the errors of all forms that the layers of a model may take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from ...blocks import SparseBlock, layers_path
from ...calibration import Calibration
from ...condense.refit import LayerExamples
from ...condense.refit.neurons import NeuronPool
from ...condense.refit.states import HiddenStates
from ...config import CondenseConfig
from ...decoder.stream import LayerStream
from ...model.layers_cdmoe import CondensedMLP
from ...offload import offload_like
from ...plan import CondensedLayer
from ...processes import Processes
from ...spread import LayerCurves
from ..state import SearchState
from .forms import block_parameters, condensed_parameters, empty_layer
from .measure import Families, measure_layer
from .sensitivity import few_batches, output_changes

logger = logging.get_logger(__name__)

# A smaller error says nothing about how the output depends on it.
_LEAST_ERROR = 1e-9
# From a layer's examples and neurons to that order.
StayOrder = Callable[[LayerExamples, NeuronPool], list[int]]


class CurveSearch:
    """A search for the errors of all forms of some layers, on inputs from the unmodified model.

    One decoder layer is in memory at a time if the model is offloaded.

    Args:
        stream (`LayerStream`): The model on this process's calibration batches.
        blocks (`dict[int, SparseBlock]`): The sparse blocks of the layers, by depth.
        config (`CondenseConfig`): The settings of the search.
        families (`Callable`): The forms of a layer.
        order (`Callable`): The order in which its experts stay.
        state (`SearchState`): The results so far, to which new ones are added.
        processes (`Processes`): The processes that share the batches.
    """

    def __init__(
        self,
        stream: LayerStream,
        blocks: Mapping[int, SparseBlock],
        config: CondenseConfig,
        families: Families,
        order: StayOrder,
        state: SearchState,
        processes: Processes,
    ) -> None:
        self.stream = stream
        self.blocks = dict(sorted(blocks.items()))
        self.config = config
        self.families = families
        self.order = order
        self.state = state
        self.processes = processes

    @torch.no_grad()
    def curves(self, calibration: Calibration) -> list[LayerCurves]:
        """Measure the errors of all layers, and how much the model's output depends on each.

        Args:
            calibration (`Calibration`): The batches of all processes.
        """
        condensed: dict[int, CondensedMLP] = {}
        unmeasured = [layer for layer in self.blocks if f"change {layer}" not in self.state]
        first = map(self.stream.entering, range(len(self.stream.batches)))
        inputs = HiddenStates(first, self.config.cache_bytes // 4)
        for layer in logging.tqdm(range(max(unmeasured, default=-1) + 1), desc="Error curves", unit="layer"):
            with self.stream.in_memory(layer):
                if layer in unmeasured and not self._known(layer, condensed):
                    condensed[layer] = self._measure(layer, inputs)
                for batch, entering in enumerate(inputs):
                    inputs[batch] = self.stream.run_layer(layer, entering, batch)
                self.stream.check_finite()
            if layer in condensed:
                offload_like(condensed[layer], self.blocks[layer].module, f"spread-{layer}")
        few = few_batches(calibration.batches, self.processes.count)
        processes = Processes(self.processes.accelerator, len(few))
        stream = LayerStream(self.stream.model, layers_path(list(self.blocks.values())), processes.mine(few))
        changes = output_changes(stream, self.blocks, condensed, self.config.cache_bytes // 2, processes, self.state)
        found = []
        for layer in self.blocks:
            curves = LayerCurves.from_dict(self.state[f"curves {layer}"])
            error = max(curves.curves[0].errors[-1], _LEAST_ERROR)
            found.append(replace(curves, sensitivity=changes[layer] / error))
        return found

    def _measure(self, layer: int, inputs: HiddenStates) -> CondensedMLP:
        block = self.blocks[layer]
        examples = LayerExamples(self.stream, block, inputs, None, self.config.cache_bytes // 2, self.processes)
        # With a width, neurons of experts that no token chose are there too, after all others.
        pool = NeuronPool(CondensedLayer(layer, [], [], width=block.num_experts * block.intermediate_size), examples)
        order = self.order(examples, pool)
        families = self.families(block, order)
        curves, mlp = measure_layer(examples, pool, families, self.config.refit_neurons == "least_squares")
        sizes = (block.num_experts, block_parameters(block), condensed_parameters(block)[1])
        if (file := self._file(layer)) is not None:
            new = file.with_suffix(".new")
            save_file({name: weight.contiguous() for name, weight in mlp.state_dict().items()}, new)
            new.replace(file)
        self.state[f"curves {layer}"] = asdict(LayerCurves(layer, *sizes, 0.0, order, curves))
        least = min((error, curve.routed) for curve in curves for error in curve.errors)
        logger.info(f"Decoder layer {layer}: errors from {least[0]:.3g}, with {least[1]} experts behind the router.")
        return mlp

    def _known(self, layer: int, condensed: dict[int, CondensedMLP]) -> bool:
        """Return whether a layer's errors are known, after reading its condensed form."""
        if f"curves {layer}" not in self.state:
            return False
        file = self._file(layer)
        if not self.processes.agreed(file is not None and file.exists()):
            return False
        widest = LayerCurves.from_dict(self.state[f"curves {layer}"]).curves[0].widths[-1]
        condensed[layer] = mlp = empty_layer(self.blocks[layer], widest)
        if file is not None:
            mlp.load_state_dict(load_file(file))
        self.processes.send(0, *mlp.state_dict().values())
        return True

    def _file(self, layer: int) -> Path | None:
        """Return the file of a condensed layer beside the search's state; None without one."""
        return None if self.state.path is None else self.state.path.with_name(f"condensed-{layer}.safetensors")
