"""The layers of condensed models; a copy of this file is saved beside weights (see `modeling_cdmoe`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN


def _clamped(act: Any, gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return act(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _clamped_after(act: Any, gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return act(gate).clamp(max=limit) * up.clamp(-limit, limit)


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
    "clamped": _clamped,
    "clamped_after": _clamped_after,
    "gpt_oss": _gpt_oss,
    "softcapped": _softcapped,
}


class EmptyLinear(nn.Linear):
    """A projection of width 0, for an MLP that keeps no expert and has no shared one.

    A subclass because transformers quantises exactly `nn.Linear`, and bitsandbytes divides by the width.
    """


class CondensedMLP(nn.Module):
    """One dense gated MLP: the shared expert and the kept routed experts of a condensed layer.

    Computes `down(act(gate(x)) * up(x))`, or another gated activation. A per-token gate of the shared expert
    (Qwen1.5-MoE) scales the first `shared_intermediate_size` activations: the down projection is linear.

    Args:
        hidden_size (`int`): Width H of input and output.
        intermediate_size (`int`): Number of neurons, `shared_intermediate_size + K * expert width`; may be 0.
        hidden_act (`str`): Name of the activation in transformers' `ACT2FN`.
        shared_intermediate_size (`int`): Number of neurons of the shared expert, which come first.
        shared_expert_gate (`bool`): Whether the shared expert has a per-token sigmoid gate.
        bias (`bool`): Whether the three projections have biases.
        output_bias (`bool`): Whether the down projection has a bias even if the others have none.
        gated_activation (`Mapping`, *optional*): A "form" of `GATED_ACTIVATIONS` and its constants; "plain" by default.
            With "ungated", there is no gate projection.
        shared_gated_activation (`Mapping`, *optional*): The same for the shared expert's neurons, if it differs.
        returns_tuple (`bool`): Whether decoder layers expect router scores beside the output. They are None.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        shared_intermediate_size: int = 0,
        shared_expert_gate: bool = False,
        bias: bool = False,
        output_bias: bool = False,
        gated_activation: Mapping[str, Any] | None = None,
        shared_gated_activation: Mapping[str, Any] | None = None,
        returns_tuple: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.shared_intermediate_size = shared_intermediate_size
        linear = nn.Linear if intermediate_size > 0 else EmptyLinear
        self.gated_activation = _known_activation(gated_activation)
        self.shared_gated_activation = _known_activation(shared_gated_activation or gated_activation)
        gated = self.gated_activation["form"] != "ungated"
        self.gate_proj = linear(hidden_size, intermediate_size, bias=bias) if gated else None
        self.up_proj = linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = linear(intermediate_size, hidden_size, bias=bias or output_bias)
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False) if shared_expert_gate else None
        self.act_fn = ACT2FN[hidden_act]
        self.returns_tuple = returns_tuple
        self.norm_name: str | None = None

    @classmethod
    def from_spec(cls, hidden_size: int, spec: Mapping[str, Any]) -> CondensedMLP:
        """Build the MLP, without weights, that an entry of `condense_config["condensed_layers"]` describes.

        Raises:
            ValueError: if the spec contradicts itself; `KeyError` and `TypeError` if it lacks or mistypes a value.
        """
        if spec.get("form", "condense") != "condense":
            raise ValueError(f"unknown form {spec['form']!r}")
        if not 0 <= spec["shared_intermediate_size"] <= spec["intermediate_size"]:
            raise ValueError("the shared expert is wider than the layer")
        needed = ("intermediate_size", "hidden_act", "shared_intermediate_size", "shared_expert_gate", "bias")
        given = ("output_bias", "gated_activation", "shared_gated_activation", "returns_tuple")
        known = {name: spec[name] for name in needed} | {name: spec[name] for name in given if name in spec}
        return cls(hidden_size, **known)

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
        if self.shared_expert_gate is not None:
            shared, routed = inner.tensor_split([self.shared_intermediate_size], dim=-1)
            shared = shared * torch.sigmoid(self.shared_expert_gate(hidden_states))
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
        output = torch.zeros_like(hidden_states)
        return (output, None) if self.returns_tuple else output


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
    for layer, spec in layers.items():
        try:
            parent_name, _, name = spec["module"].rpartition(".")
            parent = model.base_model.get_submodule(parent_name)
            children = {child for child, _ in parent.named_children()}
            routers = [spec["router"]] if spec.get("router") is not None else []
            if parent_name.rpartition(".")[2] != layer or not children.issuperset([name, *spec["omitted"], *routers]):
                raise ValueError("it names modules that the layer does not have")
            if spec.get("form", "condense") == "trim_layer":
                replacement: Any = Trimmed(spec.get("returns_tuple", False))
            else:
                replacement = CondensedMLP.from_spec(model.config.get_text_config().hidden_size, spec)
                if spec.get("norm") is not None:
                    replacement.keep_norm(spec["norm"], getattr(getattr(parent, name), spec["norm"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`condense_config.condensed_layers` of this checkpoint's config.json can't be understood for decoder "
                f"layer {layer}: {spec!r} ({error!r}). The file was edited or comes from another version."
            ) from error
        replacement.train(parent.training)
        setattr(parent, name, replacement)
        for other in spec["omitted"]:
            setattr(parent, other, Omitted())
        for router in routers:
            setattr(parent, router, NoRouter())
