"""Plans: the layers to condense, the experts kept in each, and their gates. One JSON file, no pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .atomic import write_json
from .checks import is_int, read_by_layer, read_flat_mapping, read_list, read_object, read_whole, short
from .config import FORMS
from .plan_files import plan_file
from .plan_layer import CondensedLayer, layers_of, size_restrictions
from .reference import read_reference
from .shapes import ModelShape
from .sizes import read_target
from .spread import Spread

VERSION = 1
_BUDGET = ("num_layers", "num_experts", "expert_budget")


@dataclass(frozen=True)
class CondensePlan:
    """The layers of a model to condense, the experts kept in each, and their gates.

    Layers and experts are in the order of their selection, and with every method the choice for a smaller budget is
    the beginning of that for a larger one. One search therefore serves all smaller budgets: see `truncate`.

    Args:
        layers (`list[CondensedLayer]`): The condensed layers in the order of their selection.
        model (`ModelShape`, *optional*): Sizes of the model that the plan was made for, checked before it is applied.
        config (`dict`, *optional*): The `CondenseConfig` of the search.
        calibration (`dict`, *optional*): The calibration data of the search (source, samples, tokens).
        layer_divergences (`dict[int, float]`, *optional*): Divergence of the model's output with only one layer
            condensed, by decoder layer (Figure 1 of the paper). With an `expert_budget` it is measured at the same K
            for all layers, not at the K that a layer ends up with. None if the layer search does not measure it
            ("local", "similarity") or none was run.
        form (`str`, defaults to `"condense"`): What becomes of the layers: "condense", "prune_experts" (only
            `routed` experts stay), "trim_layer" (their MLP sub-layer is dropped) or "trim_block" (they are dropped
            whole).
        layer_similarities (`dict[int, float]`, *optional*): Cosine similarity of a layer's input and output, by decoder
            layer, if layers were chosen by it.
        cut_from (`dict`, *optional*): The `num_layers`, `num_experts` and `expert_budget` of the search, or its
            `target_size`, if `truncate` made the plan smaller. Plans are compared without it.
        token_layers (`int`, *optional*): The work of the layer search: the number of decoder layers that it ran, times
            tokens. Plans are compared without it.
        spread (`Spread`, *optional*): The forms that every sparse layer could take, if the search was for a
            `target_size`. Layers that are not in `layers` stay as they are.
        restricted (`dict`, *optional*): The cost of `CondenseConfig.exportable`: the `divergence` of the model's output
            with the plan's layers condensed, and the `free_divergence` of the `free_layers` that the search would have
            chosen among all. None if the choice was free, or if `truncate` has dropped layers or experts.
    """

    layers: list[CondensedLayer]
    model: ModelShape | None = None
    config: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    layer_divergences: dict[int, float] | None = field(default=None)
    form: str = "condense"
    layer_similarities: dict[int, float] | None = None
    cut_from: dict[str, Any] | None = field(default=None, compare=False)
    token_layers: int | None = field(default=None, compare=False)
    spread: Spread | None = None
    restricted: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        indices = [layer.layer for layer in self.layers]
        doubled = sorted({i for i in indices if indices.count(i) > 1})
        if doubled:
            raise ValueError(f"The plan condenses decoder layers {doubled} more than once.")
        if not self.layers:
            raise ValueError("The plan condenses no layer.")
        if self.form not in FORMS:
            raise ValueError(f"`form` should be one of {', '.join(map(repr, FORMS))}, but is {short(self.form)}.")
        keeping = [layer.layer for layer in self.layers if layer.experts]
        if self.form != "condense" and keeping:
            raise ValueError(f"The plan's form is {self.form!r}, but its decoder layers {keeping} keep experts.")
        pruned = {layer.layer: bool(layer.routed) for layer in self.layers}
        wrong = [layer for layer, stay in pruned.items() if stay != (self.form == "prune_experts")]
        if self.form != "condense" and wrong:
            raise ValueError(
                f"The plan's form is {self.form!r}, but its decoder layers {wrong} "
                f"{'keep experts' if self.form.startswith('trim') else 'name no experts to keep in `routed`'}."
            )
        if self.model is not None:
            self.check_fits(self.model)

    # --- files ---

    def to_dict(self) -> dict[str, Any]:
        """Convert the plan to JSON-ready values, without the optional fields that version 0.1 did not have."""
        by_layer = {name: _string_keys(getattr(self, name)) for name in ("layer_divergences", "layer_similarities")}
        layers = [layer.to_dict() for layer in self.layers]
        values = {"version": VERSION, **asdict(self), **by_layer, "layers": layers}
        return {k: v for k, v in values.items() if v or k not in ("cut_from", "token_layers", "spread", "restricted")}

    @classmethod
    def from_dict(cls, values: Any) -> CondensePlan:
        """Make a plan from the values that `to_dict` returns.

        Raises:
            ValueError: naming the field, if a value has a wrong type, is not finite or occurs twice, if a field is
                unknown, or if the plan has another version.
        """
        version = values.get("version") if isinstance(values, Mapping) else None
        if version != VERSION or isinstance(version, bool):
            raise ValueError(
                f"`version` of a condense plan should be {VERSION}, the only one that this package reads, but is "
                f"{version!r}."
            )
        fields = read_object(values, "plan", {"version": None, **cls.__dataclass_fields__})
        layers = read_list(fields["layers"], "layers")
        return cls(
            layers=[CondensedLayer.from_dict(row, f"layers[{i}]") for i, row in enumerate(layers)],
            model=None if fields["model"] is None else ModelShape.from_dict(fields["model"]),
            config=read_flat_mapping(fields["config"], "config"),
            calibration=read_flat_mapping(fields["calibration"], "calibration"),
            layer_divergences=read_by_layer(fields["layer_divergences"], "layer_divergences"),
            form=fields["form"],
            layer_similarities=read_by_layer(fields["layer_similarities"], "layer_similarities"),
            cut_from=read_flat_mapping(fields["cut_from"], "cut_from"),
            restricted=_read_restricted(fields["restricted"]),
            token_layers=None if fields["token_layers"] is None else read_whole(fields["token_layers"], "token_layers"),
            spread=None if fields["spread"] is None else Spread.from_dict(fields["spread"]),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON. An existing file is replaced in one step, or kept if that fails."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> CondensePlan:
        """Read a plan that `save` wrote; `path` may also be the folder of a condensed checkpoint or condense adapter.

        Raises:
            ValueError: if the file is not a valid plan.
            FileNotFoundError: if there is no such file, or the folder holds no plan.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"`plan` should be a CondensePlan or a path, but is a {type(path).__name__}.")
        path, read = plan_file(Path(path))
        try:
            return cls.from_dict(read(path))
        except ValueError as error:
            raise ValueError(f"{path} is not a valid condense plan: {error}") from error

    @classmethod
    def from_reference(
        cls,
        *,
        expert_weights: str | os.PathLike | Mapping[str, Sequence[float]],
        expert_order: str | os.PathLike | Mapping[str, Sequence[int]],
        layer_order: str | os.PathLike | Sequence[int],
        first_sparse_layer: int = 1,
    ) -> CondensePlan:
        """Read the result files published by the paper's authors; see `cdmoe_plugin.reference.read_reference`."""
        rows = read_reference(expert_weights, expert_order, layer_order, first_sparse_layer)
        return cls([CondensedLayer.from_dict(row, f"layer {row['layer']}") for row in rows])

    # --- use ---

    def truncate(
        self,
        num_layers: int | None = None,
        num_experts: int | None = None,
        target_size: float | str | None = None,
    ) -> CondensePlan:
        """Cut the plan to a smaller budget: its first layers, with at most `num_experts` experts. Needs no model.

        A plan of a search for a `target_size` is cut to another one: what becomes of each layer is decided anew, from
        the errors in the plan's `spread`.

        The experts are those that a search for fewer experts would have chosen. The layers were put in order with
        more experts kept, so `score` and `layer_divergences` no longer apply where experts are dropped: they are
        dropped too.

        Raises:
            ValueError: if the plan has fewer layers or experts than asked for, or can't be cut to a size.
        """
        if target_size is not None or (self.spread is not None and (num_layers, num_experts) != (None, None)):
            return self._cut_to_size(target_size, num_layers, num_experts)
        layers = self.layers
        if num_layers is not None:
            if not is_int(num_layers) or not 1 <= num_layers <= len(layers):
                raise ValueError(
                    f"`num_layers` should be between 1 and the plan's {len(layers)}, but is {num_layers!r}."
                )
            layers = layers[:num_layers]
        divergences = self.layer_divergences
        if num_experts is not None:
            most = max(len(layer.experts) for layer in layers)
            if not is_int(num_experts) or not 0 <= num_experts <= most:
                raise ValueError(f"`num_experts` should be between 0 and the plan's {most}, but is {num_experts!r}.")
            cut = [len(layer.experts) > num_experts for layer in layers]
            if any(cut):
                divergences = None
                # A score covers all layers so far.
                layers = [row.with_experts(num_experts, not any(cut[: i + 1])) for i, row in enumerate(layers)]
        config, cut_from = self.config, self.cut_from
        if config is not None:
            if layers != self.layers:
                cut_from = cut_from or {name: config.get(name) for name in _BUDGET}
            config = {**config, "num_layers": len(layers)}
            if num_experts is not None:
                config |= {"num_experts": num_experts, "expert_budget": None}
            elif config.get("expert_budget") is not None and len(layers) < len(self.layers):
                config["expert_budget"] = sum(len(layer.experts) for layer in layers)
            if config.get("layers") is not None:
                config["layers"] = [layer.layer for layer in layers]
        restricted = self.restricted if layers == self.layers else None
        return replace(
            self,
            layers=layers,
            config=config,
            layer_divergences=divergences,
            cut_from=cut_from,
            restricted=restricted,
        )

    def _cut_to_size(
        self, target_size: float | str | None, num_layers: int | None, num_experts: int | None
    ) -> CondensePlan:
        if (num_layers, num_experts) != (None, None):
            raise ValueError(
                "`num_layers` and `num_experts` have no meaning for a size, which decides what becomes of every layer: "
                "cut the plan by `target_size` alone, or choose a plan that was not searched for a size."
            )
        if self.spread is None:
            raise ValueError(
                f"`target_size` is {target_size!r}, but the plan was not searched for a size, so that the errors of "
                "other sizes are unknown: use `num_layers` and `num_experts`."
            )
        spread, config = self.spread, self.config or {}
        parameters = read_target(target_size, spread.parameters, spread.itemsize)
        chosen = spread.solve(parameters, **size_restrictions(config, self.model))
        return replace(
            self,
            layers=layers_of(spread, chosen),
            config={**config, "target_size": target_size},
            cut_from=self.cut_from or {"target_size": config.get("target_size")},
        )

    def as_trimming(self, form: str) -> CondensePlan:
        """Make a plan that drops the same layers instead of condensing them (the paper's baselines), in the same order.

        Experts, gates and the values measured with them are left out. `truncate(num_layers=...)` still works.

        Args:
            form (`str`): "trim_layer" drops the layers' MLP sub-layers, "trim_block" the whole decoder layers.

        Raises:
            ValueError: if `form` is neither of the two.
        """
        if form not in FORMS or not form.startswith("trim"):
            raise ValueError(f"`form` should be 'trim_layer' or 'trim_block', but is {short(form)}.")
        if form == self.form:
            return self
        layers = [CondensedLayer(layer.layer, [], []) for layer in self.layers]
        config = None if self.config is None else {**self.config, "form": form}
        # The input and output of a decoder layer are not those of its MLP.
        similarities = None if "trim_block" in (form, self.form) else self.layer_similarities
        return replace(
            self,
            layers=layers,
            config=config,
            layer_divergences=None,
            form=form,
            layer_similarities=similarities,
            spread=None,
            restricted=None,
        )

    def for_model(self, model: ModelShape) -> CondensePlan:
        """Check that the plan fits a model, as `check_fits`, and return it with the model's sizes."""
        self.check_fits(model)
        return self if self.model is not None else replace(self, model=model)

    def check_fits(self, model: ModelShape) -> None:
        """Check that the plan can be applied to a model of these sizes.

        Raises:
            ValueError: naming the difference, if it was made for another model or names layers or experts that the
                model does not have.
        """
        expected = self.model
        if expected is not None:
            for name in ("model_type", "num_hidden_layers", "hidden_size"):
                if getattr(expected, name) != getattr(model, name):
                    raise ValueError(
                        f"The plan was made for another model: its {name} is {getattr(expected, name)!r}, this model's "
                        f"is {getattr(model, name)!r}."
                    )
            for row, other in zip_longest(expected.sparse_layers, model.sparse_layers):
                if row != other:
                    raise ValueError(f"The plan was made for another model: it has {row}, this model has {other}.")
        sparse = {row.layer: row for row in model.sparse_layers}
        for layer in self.layers:
            if layer.layer not in sparse:
                raise ValueError(
                    f"The plan condenses decoder layer {layer.layer}, which is not a sparse layer of this model; its "
                    f"sparse layers are {sorted(sparse)}."
                )
            unknown = [
                e for e in (*layer.experts, *(layer.routed or ())) if not 0 <= e < sparse[layer.layer].num_experts
            ]
            if unknown:
                raise ValueError(
                    f"The plan keeps experts {unknown} of decoder layer {layer.layer}, which has "
                    f"{sparse[layer.layer].num_experts} (0 to {sparse[layer.layer].num_experts - 1})."
                )


def _string_keys(values: dict[int, float] | None) -> dict[str, float] | None:
    return None if values is None else {str(key): value for key, value in values.items()}


def _read_restricted(values: Any) -> dict[str, Any] | None:
    read = read_flat_mapping(values, "restricted")
    names = {"divergence", "free_divergence", "free_layers"}
    if read is not None and read.keys() != names:
        raise ValueError(f"`restricted` should have {', '.join(sorted(names))}, but has {sorted(read)}.")
    return read
