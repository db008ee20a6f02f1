"""The config of a model with fewer decoder layers, found by structure and verified by building the model again.

Configs describe single layers under many names (`layer_types`, `mlp_only_layers`, `first_k_dense_replace`, ...), and
none is looked up here. A list as long as the decoder may contain one value per layer or indices of layers, a number may
be a boundary between layers: each such field has a few readings. The right ones are those with which the config,
written as JSON and read again, builds exactly the remaining decoder layers and leaves everything else unchanged.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...blocks import UnsupportedModelError
from ...checks import is_out_of_memory

# Errors that configs and models raise for contradictory fields.
_REFUSALS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    StrictDataclassError,
)
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Remaining:
    """The description of a model without some decoder layers.

    Args:
        kept (`list[int]`): The remaining decoder layers by depth, by their former indices.
        fields (`dict[str, Any]`): Config fields that change, with their new values.
        attributes (`list[tuple[str, str, Any]]`): Attributes of modules that depend on their layer: new name of the
            module, name of the attribute, new value.
    """

    kept: list[int]
    fields: dict[str, Any]
    attributes: list[tuple[str, str, Any]]


class _Mismatch(Exception):
    """A difference between the model that config fields build and the expected one."""


class _Attempt(NamedTuple):
    """The comparison of a model built from some config fields with the expected one.

    Args:
        differing (`float`): Number of modules that differ; infinite if the fields build no model.
        reason (`str`): The first difference.
        attributes (`list[tuple[str, str, Any]]`): As in `Remaining`.
    """

    differing: float
    reason: str
    attributes: list[tuple[str, str, Any]]


def without_layers(model: PreTrainedModel, layers_path: str, dropped: Iterable[int]) -> Remaining:
    """Find the config fields and module attributes that describe a model without some of its decoder layers.

    Nothing is computed and the model is not changed; it may be on the meta device.

    Args:
        model (`PreTrainedModel`): The whole model.
        layers_path (`str`): Name of the list of decoder layers in the base model, such as "layers".
        dropped (`Iterable[int]`): Decoder layers to drop.

    Raises:
        UnsupportedModelError: if no layer would remain, or if the config can't describe the remaining ones.
    """
    config: Any = model.config
    total = len(model.base_model.get_submodule(layers_path))  # type: ignore[arg-type]
    dropped = set(dropped)
    kept = [layer for layer in range(total) if layer not in dropped]
    what = f"model type {config.model_type!r} can't do without its decoder layers {sorted(dropped)}"
    if not kept:
        raise UnsupportedModelError(f"{what}: no layer would remain.")
    if config.get_text_config() is not config:
        raise UnsupportedModelError(f"{what}: it is part of a larger model.")
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    count = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    choices = {name: readings(name, value, kept, total) for name, value in values.items() if name != count}
    choices = {name: found for name, found in choices.items() if len(found) > 1 or found[0] != values[name]}
    # Some configs have no number of layers, only a list of them (nemotron_h).
    number = {count: len(kept)} if count in values else {}
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    try:
        before = _build(type(model), config)
        with_buffers = _computes_buffers(before.base_model.get_submodule(layers_path))
        before = _build(type(model), config, with_buffers) if with_buffers else before
    except _Mismatch as error:
        raise UnsupportedModelError(f"{what}: its own config does not build it ({error}).") from error

    def attempt(fields: dict[str, Any]) -> _Attempt:
        try:
            after = _build(type(model), _changed(config, fields), with_buffers)
        except _Mismatch as error:
            return _Attempt(math.inf, str(error), [])
        return _compare(before, after, f"{prefix}{layers_path}.", kept, total)

    fields = {**number, **{name: found[0] for name, found in choices.items()}}
    first = best = attempt(fields)
    alternatives = [(name, reading) for name, found in choices.items() for reading in found[1:]]
    # Change one field at a time, the one whose other reading leaves the fewest differing modules.
    while best.differing and alternatives:
        tried = [(attempt({**fields, name: reading}), name, reading) for name, reading in alternatives]
        other, name, reading = min(tried, key=lambda each: each[0].differing)
        if other.differing >= best.differing:
            break
        fields, best = {**fields, name: reading}, other
    if best.differing:
        raise UnsupportedModelError(
            f"{what}: its config can't describe the remaining layers ({first.reason}). Repeating patterns of layers, "
            "and layers that depend on their position, are not supported."
        )
    changed = {name: value for name, value in fields.items() if value != values[name]}
    return Remaining(kept, changed, best.attributes)


def readings(name: str, value: Any, kept: Sequence[int], total: int) -> list[Any]:
    """List the possible values of a config field when only the `kept` of `total` layers remain, the likeliest first."""
    found: list[Any] = [value]
    if "token" in name:  # a list of token ids may be as long as a shallow decoder
        return found
    if isinstance(value, int) and not isinstance(value, bool) and re.search("layer|dense", name):
        # A boundary between layers: the first index after it or the last one before.
        found += [sum(k < value for k in kept), sum(k <= value for k in kept) - 1]
    elif isinstance(value, (list, tuple)) and value:
        place = {old: new for new, old in enumerate(kept)}
        indices = all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < total for v in value)
        per_layer = [value[k] for k in kept] if len(value) == total else None
        renumbered = [place[v] for v in value if v in place] if indices else None
        both = [place[v] for v in per_layer if v in place] if indices and per_layer else None
        if both and len(both) < len(kept):
            both = None
        first = [renumbered] if indices and len(set(value)) == len(value) and "layer" in name else []
        ordered = [*first, per_layer, both, value, renumbered]
        found = [type(value)(reading) for reading in ordered if reading is not None]
    return [reading for i, reading in enumerate(found) if reading not in found[:i]]


def _changed(config: PreTrainedConfig, fields: dict[str, Any]) -> PreTrainedConfig:
    changed = copy.deepcopy(config)
    vars(changed).update(fields)
    return changed


def _computes_buffers(layers: nn.Module) -> bool:
    return any(module._non_persistent_buffers_set for module in layers.modules())


def _build(model_class: type[PreTrainedModel], config: PreTrainedConfig, with_buffers: bool = False) -> PreTrainedModel:
    """Build a model on the meta device from `config` as a file would store it, optionally with real buffers.

    Raises:
        _Mismatch: if the config or the model refuses it. Out-of-memory errors are raised as they are.
    """
    try:
        again = type(config).from_dict(json.loads(json.dumps(config.to_diff_dict())))
        for name, value in vars(config).items():
            if not name.startswith("_") and isinstance(value, list) and vars(again).get(name) != value:
                raise _Mismatch(f"`{name}` would be {vars(again).get(name)} instead of {value}")
        # With buffers, every parameter takes memory for a moment; few architectures need that.
        with init_empty_weights(include_buffers=False) if with_buffers else torch.device("meta"):
            return model_class(again)
    except _REFUSALS as error:
        if is_out_of_memory(error):
            raise
        raise _Mismatch(f"it is refused: {error}") from error


def _compare(before: nn.Module, after: nn.Module, layers: str, kept: Sequence[int], total: int) -> _Attempt:
    """Compare `after` with the `kept` layers and all else of `before`, module by module."""
    new_names = {f"{layers}{old}": f"{layers}{new}" for new, old in enumerate(kept)}
    pattern = re.compile(re.escape(layers) + r"\d+")
    expected: dict[str, nn.Module] = {}
    for name, module in before.named_modules():
        match = pattern.match(name)
        if match is None:
            expected[name] = module
        elif match[0] in new_names:
            expected[new_names[match[0]] + name[match.end() :]] = module
    found = dict(after.named_modules())
    changed, differences = [], []
    for name in sorted(expected.keys() | found.keys()):
        old, new = expected.get(name), found.get(name)
        match = pattern.match(name)
        index = int(match[0].removeprefix(layers)) if match else None
        try:
            if old is None or new is None or type(old) is not type(new):
                raise _Mismatch(f"{name} would be {_kind(new)} instead of {_kind(old)}")
            _compare_tensors(name, old, new, index is None)
            changed += [(name, *each) for each in _compare_attributes(name, old, new, index, kept, total)]
        except _Mismatch as error:
            differences.append(str(error))
    return _Attempt(len(differences), differences[0] if differences else "", changed)


def _kind(module: nn.Module | None) -> str:
    return "nothing" if module is None else f"{type(module).__name__}"


def _compare_tensors(where: str, old: nn.Module, new: nn.Module, shared: bool) -> None:
    """Compare names and shapes of weights, and values of buffers that are computed when a checkpoint is opened.

    Modules shared by all layers have such buffers for each kind of layer, and lose them with the last layer of a kind.
    """
    one, other = _saved_shapes(old), _saved_shapes(new)
    if one != other:
        raise _Mismatch(f"{where} would have the weights {other} instead of {one}")
    before, after = _computed(old), _computed(new)
    lost = set() if shared else before.keys() - after.keys()
    if lost or not all(name in before and _same(before[name], after[name]) for name in after):
        raise _Mismatch(f"the buffers {sorted(before)} of {where} would have other values")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (one.is_meta or torch.equal(one, other))


def _saved_shapes(module: nn.Module) -> dict[str, list[int]]:
    tensors = {**module._parameters, **module._buffers}
    computed = module._non_persistent_buffers_set
    return {name: list(t.shape) for name, t in tensors.items() if t is not None and name not in computed}


def _computed(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name in module._non_persistent_buffers_set if (t := module._buffers.get(name)) is not None}


def _compare_attributes(
    where: str, old: nn.Module, new: nn.Module, index: int | None, kept: Sequence[int], total: int
) -> list[tuple[str, Any]]:
    one, other = _plain_attributes(old), _plain_attributes(new)
    changed = []
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        if a == b or (index is None and name not in other):  # one per kind of layer, as for buffers
            continue
        renumbered = index is not None and (a, b) == (kept[index], index)
        shortened = isinstance(a, (list, tuple)) and b in readings("layers", a, kept, total)
        fewer_kinds = index is None and isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and {*b} < {*a}
        if not (renumbered or shortened or fewer_kinds or (a, b) == (total, len(kept))):
            raise _Mismatch(f"`{name}` of {where or 'the model'} would be {b!r} instead of {a!r}")
        changed.append((name, b))
    return changed


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, (list, tuple)) and all(isinstance(v, _PLAIN) for v in value))
