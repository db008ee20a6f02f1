"""The layers of condensed models; a copy of this file is saved beside weights (see `modeling_cdmoe`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN


def _gpt_oss(_act: Any, gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * (gate * torch.sigmoid(alpha * gate))


def _softcapped(_act: Any, gate: Tensor, up: Tensor, gate_softcap: float, up_softcap: float) -> Tensor:
    g, u = gate.float(), up.float()
    inner = gate_softcap * torch.tanh(g / gate_softcap) * torch.sigmoid(g) * up_softcap * torch.tanh(u / up_softcap)
    return inner.to(gate.dtype)


# Gated activations: functions of the activation, gate and up, with constants from config.json.
GATED_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda act, gate, up: act(gate) * up,
    "ungated": lambda act, _gate, up: act(up),
    "clamped": lambda act, gate, up, limit: act(gate.clamp(max=limit)) * up.clamp(-limit, limit),
    "clamped_after": lambda act, gate, up, limit: act(gate).clamp(max=limit) * up.clamp(-limit, limit),
    "gpt_oss": _gpt_oss,
    "softcapped": _softcapped,
}


class PlainLinear(nn.Linear):
    """A linear layer that is never quantised: a projection of width 0, by which bitsandbytes would divide, or gates.

    A subclass because transformers quantises exactly `nn.Linear`.
    """


class CondensedMLP(nn.Module):
    """One dense gated MLP: the shared expert and the kept routed experts of a condensed layer.

    Computes `down(act(gate(x)) * up(x))`, or another gated activation. A per-token gate of the shared expert
    (Qwen1.5-MoE) scales the first `shared_intermediate_size` activations: the down projection is linear. With
    `gated_neurons`, which leaves the plain form, `sigmoid(expert_gates(x))` scales those of each routed expert.

    An entry of `condense_config["condensed_layers"]` describes it by these fields, the last five being optional:

    - `intermediate_size` (`int`): Number of neurons, `shared_intermediate_size + K * expert width`; may be 0.
    - `hidden_act` (`str`): Name of the activation in transformers' `ACT2FN`.
    - `shared_intermediate_size` (`int`): Number of neurons of the shared expert, which come first.
    - `shared_expert_gate` (`bool`): Whether the shared expert has a per-token sigmoid gate.
    - `bias` (`bool`): Whether the three projections have biases.
    - `output_bias` (`bool`): Whether the down projection has a bias even if the others have none.
    - `gated_activation` (`Mapping`): A "form" of `GATED_ACTIVATIONS` and its constants; "plain" by default. With
      "ungated", there is no gate projection.
    - `shared_gated_activation` (`Mapping`): The same for the shared expert's neurons, if it differs.
    - `gated_neurons` (`list[int]`): Numbers of neurons of routed experts that have a per-token gate each, in order.
    - `returns_tuple` (`bool`): Whether decoder layers expect router scores beside the output. They are None.

    Args:
        hidden_size (`int`): Width H of input and output.
        spec (`Mapping`): The entry.

    Raises:
        ValueError: if the spec contradicts itself; `KeyError` and `TypeError` if it lacks or mistypes a value.
    """

    def __init__(self, hidden_size: int, spec: Mapping[str, Any]) -> None:
        super().__init__()
        if spec.get("form", "condense") != "condense":
            raise ValueError(f"unknown form {spec['form']!r}")
        self.hidden_size = hidden_size
        self.intermediate_size = width = spec["intermediate_size"]
        self.shared_intermediate_size = shared = spec["shared_intermediate_size"]
        if not 0 <= shared <= width:
            raise ValueError("the shared expert is wider than the layer")
        self.gated_neurons: list[int] = spec.get("gated_neurons", [])
        if self.gated_neurons and (min(self.gated_neurons) < 0 or sum(self.gated_neurons) + shared != width):
            raise ValueError("`gated_neurons` are not all neurons of the routed experts")
        linear = nn.Linear if width > 0 else PlainLinear
        activation, bias = spec.get("gated_activation"), spec["bias"]
        self.gated_activation = _known_activation(activation)
        self.shared_gated_activation = _known_activation(spec.get("shared_gated_activation") or activation)
        self.gate_proj = linear(hidden_size, width, bias=bias) if self.gated_activation["form"] != "ungated" else None
        self.up_proj = linear(hidden_size, width, bias=bias)
        self.down_proj = linear(width, hidden_size, bias=bias or spec.get("output_bias", False))
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False) if spec["shared_expert_gate"] else None
        self.expert_gates = PlainLinear(hidden_size, len(self.gated_neurons)) if self.gated_neurons else None
        self.act_fn = ACT2FN[spec["hidden_act"]]
        self.returns_tuple = spec.get("returns_tuple", False)
        self.norm_name: str | None = None

    def keep_norm(self, name: str, norm: nn.Module) -> None:
        """Normalise the output, as some architectures do, with a norm that keeps its name in the sparse block."""
        self.add_module(name, norm)
        self.norm_name = name

    def forward(self, hidden_states: Tensor, *_routing: Any, **_for_router: Any) -> Any:
        """Map `hidden_states` `[..., H]` to the same shape and dtype; arguments for a router are ignored."""
        output = self.sum_of_experts(hidden_states)
        if self.norm_name is not None:
            output = getattr(self, self.norm_name)(output)
        return (output, None) if self.returns_tuple else output

    def sum_of_experts(self, hidden_states: Tensor) -> Tensor:
        """Compute the output before any norm."""
        up = self.up_proj(hidden_states)
        inner = self._inner(up if self.gate_proj is None else self.gate_proj(hidden_states), up)
        if self.shared_expert_gate is not None or self.expert_gates is not None:
            shared, routed = inner.tensor_split([self.shared_intermediate_size], dim=-1)
            if self.shared_expert_gate is not None:
                shared = shared * torch.sigmoid(self.shared_expert_gate(hidden_states))
            if self.expert_gates is not None:
                gates = torch.sigmoid(self.expert_gates(hidden_states)).split(1, dim=-1)
                pairs = zip(gates, self.gated_neurons, strict=True)
                routed = routed * torch.cat([gate.expand(*gate.shape[:-1], n) for gate, n in pairs], dim=-1)
            inner = torch.cat([shared, routed], dim=-1)
        return self.down_proj(inner)

    def _inner(self, gate: Tensor, up: Tensor) -> Tensor:
        kinds = [self.shared_gated_activation, self.gated_activation]
        if kinds[0] == kinds[1]:
            return _activated(self.act_fn, gate, up, **kinds[0])
        gates, ups = (part.tensor_split([self.shared_intermediate_size], dim=-1) for part in (gate, up))
        parts = zip(gates, ups, kinds, strict=True)
        return torch.cat([_activated(self.act_fn, g, u, **kind) for g, u, kind in parts], dim=-1)


def _activated(act: Any, gate: Tensor, up: Tensor, form: str, **constants: float) -> Tensor:
    return GATED_ACTIVATIONS[form](act, gate, up, **constants)


def _known_activation(spec: Mapping[str, Any] | None) -> dict[str, Any]:
    form = (spec or {}).get("form", "plain")
    if form not in GATED_ACTIVATIONS:
        raise ValueError(f"unknown form {form!r} of a gated activation; known are {', '.join(GATED_ACTIVATIONS)}")
    constants = {name: float(value) for name, value in (spec or {}).items() if name != "form"}
    signature(GATED_ACTIVATIONS[form]).bind(None, None, None, **constants)
    return {"form": form, **constants}


class Omitted(nn.Module):
    """A stand-in for a shared expert that is folded into the condensed MLP beside it: returns zero."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(())


class NoRouter(nn.Module):
    """A stand-in for a router that a decoder layer calls before its experts; a condensed MLP needs no routing."""

    def forward(self, *_args: Any) -> tuple[None, None, None]:
        return None, None, None


class Trimmed(nn.Module):
    """A stand-in for a dropped MLP: returns zeros, so that only the residual passes."""

    def __init__(self, returns_tuple: bool = False) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, **_of_router: Any) -> Any:
        return (torch.zeros_like(hidden_states), None) if self.returns_tuple else torch.zeros_like(hidden_states)


def add_dense(block: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Add the output of the child `condensed` to that of experts, as a forward hook."""
    hidden, *scores = output if isinstance(output, tuple) else (output,)
    hidden = hidden + block.condensed(args[0]).view_as(hidden)
    return (hidden, *scores) if isinstance(output, tuple) else hidden


def _keep_some_experts(layer: nn.Module, spec: Mapping[str, Any]) -> None:
    """Leave `num_routed` of `num_experts` in a layer's tensors, by the dimension of the experts, and in its numbers."""
    for name, dim in spec["per_expert"].items():
        owner, _, own = name.rpartition(".")
        value = getattr(layer.get_submodule(owner), own)
        if dim is None:
            setattr(layer.get_submodule(owner), own, spec["num_routed"])
        else:
            size = value.shape[dim] // spec["num_experts"] * spec["num_routed"]
            value.data = value.data.narrow(dim, 0, size).clone()


def install_condensed_layers(model: PreTrainedModel) -> None:
    """Replace the blocks that `model.config.condense_config` lists with new `CondensedMLP`s or `Trimmed`s.

    Raises:
        ValueError: if the config names modules that the model does not have, or describes them wrongly.
    """
    condense_config = getattr(model.config, "condense_config", None)
    layers = condense_config.get("condensed_layers") if isinstance(condense_config, Mapping) else None
    if not layers or not isinstance(layers, Mapping):
        raise ValueError(
            f"The config of {type(model).__name__} has no `condense_config.condensed_layers`: the checkpoint is not "
            "condensed, or its config.json was edited."
        )
    hidden_size = model.config.get_text_config().hidden_size
    for layer, spec in layers.items():
        try:
            parent_name, _, name = spec["module"].rpartition(".")
            parent = model.base_model.get_submodule(parent_name)
            children = {child for child, _ in parent.named_children()}
            routers = [spec["router"]] if spec.get("router") is not None else []
            if parent_name.rpartition(".")[2] != layer or not children.issuperset([name, *spec["omitted"], *routers]):
                raise ValueError("it names modules that the layer does not have")
            new: Any = {other: Omitted() for other in spec["omitted"]} | {router: NoRouter() for router in routers}
            if (form := spec.get("form", "condense")) == "mixed":
                _keep_some_experts(parent, spec)
                if (dense := spec["dense"]) is not None:
                    owner, _, own = dense["module"].rpartition(".")
                    block = model.base_model.get_submodule(owner)
                    if not hasattr(block, own):
                        block.register_forward_hook(add_dense)
                    setattr(block, own, CondensedMLP(hidden_size, dense).train(parent.training))
            elif form == "trim_layer":
                new[name] = Trimmed(spec.get("returns_tuple", False))
            else:
                new[name] = mlp = CondensedMLP(hidden_size, spec)
                if spec.get("norm") is not None:
                    mlp.keep_norm(spec["norm"], getattr(getattr(parent, name), spec["norm"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`condense_config.condensed_layers` of this checkpoint's config.json can't be understood for decoder "
                f"layer {layer}: {spec!r} ({error!r}). The file was edited or comes from another version."
            ) from error
        for child, module in new.items():
            setattr(parent, child, module.train(parent.training))
