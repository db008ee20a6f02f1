"""Layers of condensed models: the dense gated MLP that a sparse block becomes, and what stands where one was.

A copy of this file lies beside saved weights, see `modeling_cdmoe`: it imports torch and transformers only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN


def _clamped(act: Any, gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    return act(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _clamped_after(act: Any, gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    return act(gate).clamp(max=limit) * up.clamp(-limit, limit)


def _gpt_oss(_act: Any, gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * (gate * torch.sigmoid(alpha * gate))


def _softcapped(
    _act: Any, gate: torch.Tensor, up: torch.Tensor, gate_softcap: float, up_softcap: float
) -> torch.Tensor:
    g, u = gate.float(), up.float()
    inner = gate_softcap * torch.tanh(g / gate_softcap) * torch.sigmoid(g) * up_softcap * torch.tanh(u / up_softcap)
    return inner.to(gate.dtype)


# What gated MLPs do between their projections, of the activation, gate and up, with constants that config.json tells.
GATED_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "plain": lambda act, gate, up: act(gate) * up,
    "ungated": lambda act, _gate, up: act(up),
    "clamped": _clamped,
    "clamped_after": _clamped_after,
    "gpt_oss": _gpt_oss,
    "softcapped": _softcapped,
}


class EmptyLinear(nn.Linear):
    """A projection from or to nothing, of an MLP that kept no expert and has no shared one.

    bitsandbytes divides by its width. transformers quantises `nn.Linear`s, and none of its subclasses.
    """


class CondensedMLP(nn.Module):
    """One dense gated MLP: the shared expert and the kept routed experts of a condensed layer.

    Computes `down(act(gate(x)) * up(x))`. Where the base architecture scales its shared expert per token by
    `sigmoid(w·x)` (Qwen1.5-MoE), that factor is applied to the first `shared_intermediate_size` activations, which
    is the same function because the down projection is linear. In place of `act(gate(x)) * up(x)`, neurons may have
    another gated activation, those of the shared expert another than the rest.

    Args:
        hidden_size (`int`): Width H of input and output.
        intermediate_size (`int`): Number of neurons, `shared_intermediate_size + K * expert width`; may be 0.
        hidden_act (`str`): Name of the activation in transformers' `ACT2FN`.
        shared_intermediate_size (`int`): How many of the neurons, from the first, are the shared expert's.
        shared_expert_gate (`bool`): Whether the shared expert has a per-token sigmoid gate.
        bias (`bool`): Whether the three projections have biases.
        output_bias (`bool`): Whether the down projection has one, also where the others have none.
        gated_activation (`Mapping`, *optional*): A "form" of `GATED_ACTIVATIONS` and its constants; "plain" by default.
            With "ungated", there is no gate projection.
        shared_gated_activation (`Mapping`, *optional*): That of the shared expert's neurons, where it is another one.
        returns_tuple (`bool`): Whether the base architecture's layers expect router scores beside the output; these are
            None then.
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

    def keep_norm(self, name: str, norm: nn.Module) -> None:
        """Norms the output, as some base architectures do in their sparse blocks, under the name that it has there."""
        self.add_module(name, norm)
        self.norm_name = name

    def forward(self, hidden_states: torch.Tensor, *_routing: Any, **_for_router: Any) -> Any:
        """Maps `hidden_states` of shape `[..., H]` to the same shape and dtype; see `returns_tuple` and `NoRouter`.

        What decoder layers give only for a router to look at (the token ids, in deepseek_v4) is ignored.
        """
        output = self.sum_of_experts(hidden_states)
        if self.norm_name is not None:
            output = getattr(self, self.norm_name)(output)
        return (output, None) if self.returns_tuple else output

    def sum_of_experts(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The output before any norm."""
        up = self.up_proj(hidden_states)
        inner = self._inner(up if self.gate_proj is None else self.gate_proj(hidden_states), up)
        if self.shared_expert_gate is not None:
            shared, routed = inner.tensor_split([self.shared_intermediate_size], dim=-1)
            shared = shared * torch.sigmoid(self.shared_expert_gate(hidden_states))
            inner = torch.cat([shared, routed], dim=-1)
        return self.down_proj(inner)

    def _inner(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.shared_gated_activation == self.gated_activation:
            return _apply_activation(self.act_fn, gate, up, **self.gated_activation)
        kinds = (self.shared_gated_activation, self.gated_activation)
        gates, ups = (part.tensor_split([self.shared_intermediate_size], dim=-1) for part in (gate, up))
        parts = zip(gates, ups, kinds, strict=True)
        return torch.cat([_apply_activation(self.act_fn, g, u, **kind) for g, u, kind in parts], dim=-1)


def _apply_activation(act: Any, gate: torch.Tensor, up: torch.Tensor, form: str, **constants: float) -> torch.Tensor:
    return GATED_ACTIVATIONS[form](act, gate, up, **constants)


def _known_activation(spec: Mapping[str, Any] | None) -> dict[str, Any]:
    form = (spec or {}).get("form", "plain")
    if form not in GATED_ACTIVATIONS:
        raise ValueError(f"unknown form {form!r} of a gated activation; known are {', '.join(GATED_ACTIVATIONS)}")
    constants = {name: float(value) for name, value in (spec or {}).items() if name != "form"}
    signature(GATED_ACTIVATIONS[form]).bind(None, None, None, **constants)
    return {"form": form, **constants}


class Omitted(nn.Module):
    """Stands where a layer adds the output of a second MLP that has been folded into the condensed one."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(())


class NoRouter(nn.Module):
    """Stands where a decoder layer asks a router before it calls its experts; a condensed MLP needs no answer."""

    def forward(self, *_args: Any) -> tuple[None, None, None]:
        return None, None, None


class Trimmed(nn.Module):
    """Stands where a layer's MLP has been dropped whole: only the residual passes."""

    def __init__(self, returns_tuple: bool = False) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: torch.Tensor, **_of_router: Any) -> Any:
        output = torch.zeros_like(hidden_states)
        return (output, None) if self.returns_tuple else output


def install_condensed_layers(model: PreTrainedModel) -> None:
    """Puts an empty `CondensedMLP` (or `Trimmed`) in place of every block that `model.config.condense_config` lists.

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
            replacement = _empty_replacement(model.config.get_text_config().hidden_size, spec)
            if isinstance(replacement, CondensedMLP) and spec.get("norm") is not None:
                replacement.keep_norm(spec["norm"], getattr(getattr(parent, name), spec["norm"]))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
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


def _empty_replacement(hidden_size: int, spec: Mapping[str, Any]) -> nn.Module:
    form = spec.get("form", "condense")
    if form == "trim_layer":
        return Trimmed(spec.get("returns_tuple", False))
    if form != "condense":
        raise ValueError(f"unknown form {form!r}")
    if not 0 <= spec["shared_intermediate_size"] <= spec["intermediate_size"]:
        raise ValueError("the shared expert is wider than the layer")
    return CondensedMLP(
        hidden_size=hidden_size,
        intermediate_size=spec["intermediate_size"],
        hidden_act=spec["hidden_act"],
        shared_intermediate_size=spec["shared_intermediate_size"],
        shared_expert_gate=spec["shared_expert_gate"],
        bias=spec["bias"],
        output_bias=spec.get("output_bias", False),
        gated_activation=spec.get("gated_activation"),
        shared_gated_activation=spec.get("shared_gated_activation"),
        returns_tuple=spec.get("returns_tuple", False),
    )
