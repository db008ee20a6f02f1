"""Plans: the layers to condense, the experts kept in each, and their gates. One JSON file, no pickle."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .atomic import read_json, write_json
from .checks import (
    is_int,
    read_by_layer,
    read_flat_mapping,
    read_list,
    read_mapping,
    read_object,
    read_real,
    read_whole,
    short,
)
from .config import FORMS
from .reference import read_reference

VERSION = 1
PLAN_FILE = "condense_plan.json"


@dataclass(frozen=True)
class SparseLayerShape:
    """The sizes of one sparse layer, which tell a plan's model from others.

    Args:
        layer (`int`): Decoder layer index.
        num_experts (`int`): Routed experts N.
        intermediate_size (`int`): Neurons of one routed expert.
        shared_intermediate_size (`int`): Neurons of the shared expert; 0 without one.
    """

    layer: int
    num_experts: int
    intermediate_size: int
    shared_intermediate_size: int


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a sparse model that a plan must agree with before it is applied."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    sparse_layers: list[SparseLayerShape]

    @classmethod
    def from_dict(cls, values: Any) -> ModelShape:
        fields = read_object(values, "model", cls.__dataclass_fields__)
        if not isinstance(fields["model_type"], str):
            raise ValueError(f"`model.model_type` should be a string, but is {fields['model_type']!r}.")
        for name in ("num_hidden_layers", "hidden_size"):
            read_whole(fields[name], f"model.{name}")
        rows = []
        for i, row in enumerate(read_list(fields["sparse_layers"], "model.sparse_layers")):
            where = f"model.sparse_layers[{i}]"
            row = read_object(row, where, SparseLayerShape.__dataclass_fields__)
            rows.append(SparseLayerShape(**{k: read_whole(v, f"{where}.{k}") for k, v in row.items()}))
        return cls(**{**fields, "sparse_layers": rows})


@dataclass(frozen=True)
class CondensedLayer:
    """One condensed layer of a plan.

    Args:
        layer (`int`): Decoder layer index (0 is the first decoder layer, dense or not).
        experts (`list[int]`): The kept routed experts in the order of their selection.
        gates (`list[float]`): Their constant gates (Eq. 2), in the same order.
        score (`float`, *optional*): Divergence of the model's output (in the config's `metric` and `compare`) with this
            layer and all layers before it in the plan condensed, measured by the layer search. It means the same for
            every `layer_selection`: "local" and "global" rank layers by another value and measure it along their order.
            None if it was not measured: `layers` were given, and all keep the same number of experts.
        expert_scores (`list[float]`, *optional*): Divergence of this decoder layer's output with the shared expert
            alone, with the first kept expert, with the first two, ... (`len(experts) + 1` values). Measured for every
            `expert_selection`, with "js" if `metric` is "ppl".
        tokens (`list[int]`, *optional*): The number of calibration tokens that chose each kept expert, in the same
            order. None in plans without a search, and in plans of version 0.1.
    """

    layer: int
    experts: list[int]
    gates: list[float]
    score: float | None = None
    expert_scores: list[float] | None = None
    tokens: list[int] | None = None

    @classmethod
    def from_dict(cls, values: Any, where: str = "layer") -> CondensedLayer:
        fields = read_object(values, where, cls.__dataclass_fields__)
        read_whole(fields["layer"], f"{where}.layer")
        experts = [read_whole(e, f"{where}.experts") for e in read_list(fields["experts"], f"{where}.experts")]
        gates = [read_real(g, f"{where}.gates") for g in read_list(fields["gates"], f"{where}.gates")]
        if len(set(experts)) < len(experts):
            raise ValueError(f"`{where}.experts` names an expert more than once: {experts}.")
        if len(gates) != len(experts):
            raise ValueError(f"`{where}` has {len(experts)} experts but {len(gates)} gates.")
        if fields["score"] is not None:
            read_real(fields["score"], f"{where}.score")
        scores = fields["expert_scores"]
        if scores is not None:
            scores = [read_real(s, f"{where}.expert_scores") for s in read_list(scores, f"{where}.expert_scores")]
            if len(scores) != len(experts) + 1:
                raise ValueError(
                    f"`{where}.expert_scores` should have {len(experts) + 1} values, one more than there are experts, "
                    f"but has {len(scores)}."
                )
        tokens = fields["tokens"]
        if tokens is not None:
            tokens = [read_whole(t, f"{where}.tokens") for t in read_list(tokens, f"{where}.tokens")]
            if len(tokens) != len(experts):
                raise ValueError(f"`{where}` has {len(experts)} experts but {len(tokens)} counts in `tokens`.")
        return cls(fields["layer"], experts, gates, fields["score"], scores, tokens)

    def to_dict(self) -> dict[str, Any]:
        """Convert the layer to JSON-ready values, without `tokens` where there are none, as in version 0.1."""
        values = asdict(self)
        return values if self.tokens is not None else {k: v for k, v in values.items() if k != "tokens"}


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
        form (`str`, defaults to `"condense"`): What becomes of the layers: "condense", "trim_layer" (their MLP
            sub-layer is dropped) or "trim_block" (they are dropped whole). Trimmed layers keep no experts.
        layer_similarities (`dict[int, float]`, *optional*): Cosine similarity of a layer's input and output, by decoder
            layer, if layers were chosen by it.
    """

    layers: list[CondensedLayer]
    model: ModelShape | None = None
    config: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    layer_divergences: dict[int, float] | None = field(default=None)
    form: str = "condense"
    layer_similarities: dict[int, float] | None = None

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
        if self.model is not None:
            self.check_fits(self.model)

    # --- files ---

    def to_dict(self) -> dict[str, Any]:
        """Convert the plan to JSON-ready values."""
        by_layer = {name: _string_keys(getattr(self, name)) for name in ("layer_divergences", "layer_similarities")}
        layers = [layer.to_dict() for layer in self.layers]
        return {"version": VERSION, **asdict(self), **by_layer, "layers": layers}

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
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON. An existing file is replaced in one step, or kept if that fails."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> CondensePlan:
        """Read a plan that `save` wrote; `path` may also be a condensed checkpoint's folder.

        Raises:
            ValueError: if the file is not a valid plan.
            FileNotFoundError: if there is no such file, or the folder holds no plan.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"`plan` should be a CondensePlan or a path, but is a {type(path).__name__}.")
        path, config = Path(path), None
        if path.is_dir():
            path, config = path / PLAN_FILE, path / "config.json"
            if not path.exists() and config.exists():  # a checkpoint that was saved without this package
                path = config
        try:
            return cls.from_dict(_read_from_config(path) if path == config else read_json(path))
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

    def truncate(self, num_layers: int | None = None, num_experts: int | None = None) -> CondensePlan:
        """Cut the plan to a smaller budget: its first layers, with at most `num_experts` experts. Needs no model.

        The experts are those that a search for fewer experts would have chosen. The layers were put in order with
        more experts kept, so `score` and `layer_divergences` no longer apply where experts are dropped: they are
        dropped too.

        Raises:
            ValueError: if the plan has fewer layers or experts than asked for.
        """
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
                layers = [_keep_experts(row, num_experts, not any(cut[: i + 1])) for i, row in enumerate(layers)]
        config = self.config
        if config is not None:
            config = {**config, "num_layers": len(layers)}
            if num_experts is not None:
                config |= {"num_experts": num_experts, "expert_budget": None}
            elif config.get("expert_budget") is not None and len(layers) < len(self.layers):
                config["expert_budget"] = sum(len(layer.experts) for layer in layers)
            if config.get("layers") is not None:
                config["layers"] = [layer.layer for layer in layers]
        return replace(self, layers=layers, config=config, layer_divergences=divergences)

    def as_trimming(self, form: str) -> CondensePlan:
        """Make a plan that drops the same layers instead of condensing them (the paper's baselines), in the same order.

        Experts, gates and the values measured with them are left out. `truncate(num_layers=...)` still works.

        Args:
            form (`str`): "trim_layer" drops the layers' MLP sub-layers, "trim_block" the whole decoder layers.

        Raises:
            ValueError: if `form` is neither of the two.
        """
        if form not in FORMS[1:]:
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
            unknown = [e for e in layer.experts if not 0 <= e < sparse[layer.layer].num_experts]
            if unknown:
                raise ValueError(
                    f"The plan keeps experts {unknown} of decoder layer {layer.layer}, which has "
                    f"{sparse[layer.layer].num_experts} (0 to {sparse[layer.layer].num_experts - 1})."
                )


def _read_from_config(path: Path) -> Any:
    """Read the plan from a condensed checkpoint's config.json, where the code beside its weights writes it."""
    condense_config = read_mapping(read_json(path), "config").get("condense_config")
    plan = None if condense_config is None else read_mapping(condense_config, "condense_config").get("plan")
    if plan is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.with_name(PLAN_FILE)))
    return plan


def _keep_experts(layer: CondensedLayer, num_experts: int, keep_score: bool) -> CondensedLayer:
    scores, tokens = layer.expert_scores, layer.tokens
    return CondensedLayer(
        layer=layer.layer,
        experts=layer.experts[:num_experts],
        gates=layer.gates[:num_experts],
        score=layer.score if keep_score else None,
        expert_scores=None if scores is None else scores[: num_experts + 1],
        tokens=None if tokens is None else tokens[:num_experts],
    )


def _string_keys(values: dict[int, float] | None) -> dict[str, float] | None:
    return None if values is None else {str(key): value for key, value in values.items()}
