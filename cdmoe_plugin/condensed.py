"""Folds experts into dense MLPs, puts these in place of sparse blocks, and makes the model a condensed one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import modeling_cdmoe
from .layers_cdmoe import CondensedMLP, NoRouter, Omitted, Trimmed
from .modeling_cdmoe import CondensedModelMixin, condensed_model_class, silence_router_loss
from .offload import in_memory, in_memory_copy, offload_like
from .plan import CondensedLayer, CondensePlan
from .registration import DEEPSEEK, register_deepseek
from .sparse import GatedWeights, SparseBlock, UnsupportedModelError

if TYPE_CHECKING:
    from .config import CondenseConfig
    from .refit import RefitLayer


def _write_model_card(model: PreTrainedModel, folder: Path) -> None:
    from .model_card import write_model_card

    write_model_card(model, folder)


def _plan_from_dict(plan: dict[str, Any]) -> CondensePlan:
    try:
        return CondensePlan.from_dict(plan)
    except ValueError as error:
        raise ValueError(f"`condense_config.plan` of this model's config is no valid condense plan: {error}") from error


def _state_of_offloaded(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    from .layer_files import state_on_disk

    return state_on_disk(model)


def _about_base(name_or_path: str) -> dict[str, Any]:
    from .card_sections import base_metadata, base_name

    return {"base_model": base_name(name_or_path), "base_card": base_metadata(name_or_path)}


# With the package installed, a condensed model gives its plan as an object and saves a model card.
modeling_cdmoe.plan_from_dict = _plan_from_dict
modeling_cdmoe.write_model_card = _write_model_card
modeling_cdmoe.state_of_offloaded = _state_of_offloaded


@torch.no_grad()
def fold(block: SparseBlock, experts: Sequence[int], gates: Sequence[float]) -> CondensedMLP:
    """The condensed form of a sparse block: one dense MLP of width `I_s + K * I`, in the block's dtype and place.

    Gates (and the block's constant factors) are folded into the down projection, or into gate and up projection where
    they multiply the experts' inputs, in float32 and rounded once; so are the maps around experts in a latent space.

    Args:
        block (`SparseBlock`): The sparse block; it is not changed.
        experts (`Sequence[int]`): The kept routed experts, K of them.
        gates (`Sequence[float]`): Their constant gates.
    """
    shared = block.shared_weights()
    routed = block.expert_weights()
    parts = [] if shared is None else [(shared, block.shared_scale)]
    for index, gate in zip(experts, gates, strict=True):
        expert = block.expert(index)
        parts.append((expert.of_scaled_inputs(gate), 1.0) if block.gates_inputs else (expert, gate))
    bias = routed.biased or any(weights.biased for weights, _ in parts)
    output_bias = block.output_bias()
    if shared is not None and shared.biased and block.shared_gate is not None:
        raise UnsupportedModelError("A shared expert with both biases and a gate per token can't be condensed.")
    width = block.shared_intermediate_size + len(experts) * block.intermediate_size
    with torch.device("meta"):
        mlp = CondensedMLP(
            block.hidden_size,
            width,
            block.hidden_act,
            shared_intermediate_size=block.shared_intermediate_size,
            shared_expert_gate=block.shared_gate is not None,
            bias=bias,
            output_bias=output_bias is not None,
            gated_activation=block.activation,
            shared_gated_activation=_other_activation(block),
            returns_tuple=block.returns_tuple,
        )
    mlp = mlp.to(block.dtype).to_empty(device=block.device)
    start = 0
    for weights, factor in parts:
        rows = slice(start, start := start + weights.gate.shape[0])
        if mlp.gate_proj is not None:
            mlp.gate_proj.weight[rows] = weights.gate
        mlp.up_proj.weight[rows] = weights.up
        mlp.down_proj.weight[:, rows] = (weights.down.float() * factor).to(block.dtype)
    if mlp.down_proj.bias is not None:
        _fold_biases(mlp, parts, output_bias)
    if mlp.shared_expert_gate is not None and block.shared_gate is not None:
        mlp.shared_expert_gate.weight.copy_(block.shared_gate.weight)
    if block.norm_name is not None and block.norm is not None:
        mlp.keep_norm(block.norm_name, in_memory_copy(block.norm))
    return mlp.train(block.module.training)


def _fold_biases(
    mlp: CondensedMLP, parts: Sequence[tuple[GatedWeights, float]], output_bias: torch.Tensor | None
) -> None:
    """Each neuron keeps its biases; those of the down projections are added, gates and factors included."""
    for projection in (mlp.gate_proj, mlp.up_proj):
        if projection is not None and projection.bias is not None:
            projection.bias.zero_()
    total = torch.zeros_like(mlp.down_proj.bias, dtype=torch.float32)
    if output_bias is not None:
        total += output_bias.float()
    start = 0
    for weights, factor in parts:
        rows = slice(start, start := start + weights.gate.shape[0])
        for linear, bias in ((mlp.gate_proj, weights.gate_bias), (mlp.up_proj, weights.up_bias)):
            if linear is not None and bias is not None:
                linear.bias[rows] = bias
        if weights.down_bias is not None:
            total += weights.down_bias.float() * factor
    mlp.down_proj.bias.copy_(total)


def _other_activation(block: SparseBlock) -> dict[str, Any] | None:
    """The shared expert's gated activation where it is another one than the routed experts'."""
    if block.shared is None or block.shared_activation == block.activation:
        return None
    return block.shared_activation or {"form": "plain"}


def install(model: PreTrainedModel, block: SparseBlock, mlp: nn.Module) -> None:
    """Puts a condensed MLP (or `Trimmed`) in place of a sparse block for good."""
    for parent, name, module in _places(model, block, mlp):
        setattr(parent, name, module)


@contextmanager
def standing_in(
    model: PreTrainedModel, block: SparseBlock, mlp: nn.Module, shared: nn.Module | None = None
) -> Iterator[None]:
    """Puts a condensed MLP (or `Trimmed`, or the block itself) where a sparse block belongs, for a while.

    Args:
        model (`PreTrainedModel`): The model, sparse or condensed.
        block (`SparseBlock`): The block, by its place.
        mlp (`nn.Module`): What stands there.
        shared (`nn.Module`, *optional*): What stands in the place of a shared expert that the decoder layer owns;
            nothing by default.
    """
    places = _places(model, block, mlp, shared)
    before = [(parent, name, getattr(parent, name)) for parent, name, _ in places]
    try:
        for parent, name, module in places:
            setattr(parent, name, module)
        yield
    finally:
        for parent, name, module in before:
            setattr(parent, name, module)


def _places(
    model: PreTrainedModel, block: SparseBlock, mlp: nn.Module, shared: nn.Module | None = None
) -> list[tuple[nn.Module, str, nn.Module]]:
    parent_path, _, name = block.path.rpartition(".")
    parent = model.base_model.get_submodule(parent_path)
    if isinstance(mlp, Trimmed):
        mlp.returns_tuple = block.returns_tuple
    places: list[tuple[nn.Module, str, nn.Module]] = [(parent, name, mlp)]
    if block.shared_name is not None:
        places.append((parent, block.shared_name, Omitted() if shared is None else shared))
    if block.router_name is not None and block.router is not None:
        places.append((parent, block.router_name, block.router if mlp is block.module else NoRouter()))
    return places


def layer_spec(block: SparseBlock, mlp: nn.Module) -> dict[str, Any]:
    """What config.json must tell to build a condensed layer again (see `modeling_cdmoe.install_condensed_layers`)."""
    place: dict[str, Any] = {"module": block.path, "omitted": [] if block.shared_name is None else [block.shared_name]}
    if block.returns_tuple:
        place["returns_tuple"] = True
    if block.router_name is not None:
        place["router"] = block.router_name
    if not isinstance(mlp, CondensedMLP):
        return {**place, "form": "trim_layer"}
    special = {
        "gated_activation": block.activation,
        "shared_gated_activation": _other_activation(block),
        "norm": mlp.norm_name,
        "output_bias": mlp.down_proj.bias is not None and mlp.up_proj.bias is None,
    }
    return {
        **place,
        **{name: spec for name, spec in special.items() if spec},
        "intermediate_size": mlp.intermediate_size,
        "shared_intermediate_size": mlp.shared_intermediate_size,
        "shared_expert_gate": mlp.shared_expert_gate is not None,
        "bias": mlp.up_proj.bias is not None,
        "hidden_act": block.hidden_act,
    }


def own_config(model: PreTrainedModel) -> Any:
    """Gives a model, and all of its modules that refer to its config, a config that no other model shares.

    Models that are made from the same config object have that as theirs.
    """
    before: Any = model.config
    config = copy.copy(before)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is before:
                setattr(module, name, config)
    return config


def become_condensed(
    model: PreTrainedModel,
    plan: CondensePlan,
    specs: Mapping[int, dict[str, Any]],
    all_condensed: bool,
    parameters_before: int,
) -> None:
    """Turns a model whose blocks have been replaced into an instance of its condensed class, config included."""
    if model.config.model_type == DEEPSEEK:  # the auto classes know it only once they were asked
        register_deepseek()
    condensed_class = condensed_model_class(type(model))
    model.__class__ = condensed_class
    config = own_config(model)
    config.__class__ = condensed_class.config_class
    config.condense_config = {
        **(plan.config or {}),
        # What was done, whatever the plan's search had in mind; see `note_refit`.
        "refit": None,
        "refit_errors": None,
        "condensed_layers": {str(layer): spec for layer, spec in sorted(specs.items())},
        "all_condensed": all_condensed,
        "parameters": {"before": parameters_before, "after": model.num_parameters()},
        **_about_base(model.name_or_path or ""),
        "plan": plan.to_dict(),
    }
    if all_condensed:
        silence_router_loss(model)
    model.add_model_tags(["cdmoe"])


def note_refit(model: PreTrainedModel, config: CondenseConfig, fits: Mapping[int, RefitLayer]) -> None:
    """Writes into a condensed model's config how its layers were fitted, and their errors before and after."""
    done: dict[str, Any] = model.config.condense_config
    done |= {"refit": config.refit, "refit_target": config.refit_target, "refit_steps": config.refit_steps}
    done["refit_errors"] = {str(layer): [fit.before, fit.after] for layer, fit in fits.items()}


def refuse_quantised(*quantisations: Any) -> None:
    """Raises where any of a model's quantisation configs (or quantisers) is not None.

    Raises:
        ValueError: saying in which order to condense and quantise.
    """
    if any(quantisation is not None for quantisation in quantisations):
        raise ValueError(
            "Quantised weights can't be folded: condense first, save, and open the saved checkpoint with "
            "`quantization_config`."
        )


def refuse_condensed(model: PreTrainedModel) -> None:
    """Raises where a model is condensed already.

    Raises:
        ValueError: naming its condensed layers.
    """
    if isinstance(model, CondensedModelMixin):
        layers = sorted(map(int, model.config.condense_config["condensed_layers"]))
        raise ValueError(
            f"This model is condensed already (decoder layers {layers}). Start from the sparse model; for a smaller "
            "budget use `plan.truncate`."
        )


def check_form(blocks: Sequence[SparseBlock], layers: Sequence[CondensedLayer], form: str) -> None:
    """Checks that the layers of a plan can take its form.

    Raises:
        UnsupportedModelError: naming a layer whose MLP can't be dropped.
    """
    chosen = {layer.layer for layer in layers}
    for block in blocks:
        if form == "trim_layer" and block.layer in chosen:
            block.check_trimming()


def apply_layers(
    model: PreTrainedModel,
    blocks: Sequence[SparseBlock],
    layers: Sequence[CondensedLayer],
    form: str = "condense",
    at_once: bool = True,
    mlps: Mapping[int, CondensedMLP] | None = None,
) -> dict[int, Any]:
    """Folds and installs the layers of a plan; returns the specs for config.json by decoder layer.

    Args:
        form (`str`, defaults to `"condense"`): With "trim_layer", MLPs are dropped and nothing is folded.
        at_once (`bool`, defaults to `True`): Whether all layers are folded before the first is installed, so that a
            failure leaves the model as it was; else one after the other, which needs less memory.
        mlps (`Mapping[int, CondensedMLP]`, *optional*): Condensed MLPs by decoder layer, in place of folded ones.
    """
    by_layer = {block.layer: block for block in blocks}
    check_form(blocks, layers, form)

    def made(chosen: CondensedLayer) -> tuple[SparseBlock, nn.Module]:
        block = by_layer[chosen.layer]
        if form == "trim_layer":
            return block, Trimmed()
        if mlps is not None:
            return block, mlps[chosen.layer]
        with in_memory(model.base_model.get_submodule(block.path.rpartition(".")[0])):
            mlp = fold(block, chosen.experts, chosen.gates)
        offload_like(mlp, block.module, f"condensed-{block.layer}")
        return block, mlp

    folded = (made(chosen) for chosen in layers)
    specs = {}
    for block, mlp in list(folded) if at_once else folded:
        install(model, block, mlp)
        specs[block.layer] = layer_spec(block, mlp)
    return specs


def condensed_layers(model: PreTrainedModel) -> dict[int, CondensedMLP]:
    """The condensed MLPs of a condensed model by decoder layer, in the order of depth; none where they were trimmed.

    Raises:
        ValueError: if the model is not condensed.
    """
    config = getattr(model.config, "condense_config", None)
    if not config:
        raise ValueError(f"{type(model).__name__} is not condensed: use `condense_pretrained` or `apply_plan` first.")
    specs = sorted(config["condensed_layers"].items(), key=lambda item: int(item[0]))
    mlps: dict[int, Any] = {int(layer): model.base_model.get_submodule(spec["module"]) for layer, spec in specs}
    return {layer: mlp for layer, mlp in mlps.items() if not isinstance(mlp, Trimmed)}
