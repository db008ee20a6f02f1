"""The entry of one decoder layer in a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .checks import read_list, read_object, read_real, read_whole
from .shapes import ModelShape
from .spread import Choice, Spread


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
        routed (`list[int]`, *optional*): The routed experts that stay behind the router, in ascending order. None if
            none stays, as in the paper.
        width (`int`, *optional*): Number of neurons of the condensed MLP beside those of the shared expert. None for
            the neurons of `experts`.
    """

    layer: int
    experts: list[int]
    gates: list[float]
    score: float | None = None
    expert_scores: list[float] | None = None
    tokens: list[int] | None = None
    routed: list[int] | None = None
    width: int | None = None

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
        routed = fields["routed"]
        if routed is not None:
            routed = [read_whole(e, f"{where}.routed") for e in read_list(routed, f"{where}.routed")]
            if not routed or routed != sorted(set(routed)):
                raise ValueError(f"`{where}.routed` should name experts once, in ascending order, but is {routed}.")
        width = None if fields["width"] is None else read_whole(fields["width"], f"{where}.width")
        return cls(fields["layer"], experts, gates, fields["score"], scores, tokens, routed, width)

    def dense_neurons(self, expert_width: int) -> int:
        """Return the number of neurons of the condensed MLP beside those of the shared expert."""
        return len(self.experts) * expert_width if self.width is None else self.width

    def to_dict(self) -> dict[str, Any]:
        """Convert the layer to JSON-ready values, without the optional fields that version 0.1 did not have."""
        values = asdict(self)
        return {k: v for k, v in values.items() if v is not None or k not in ("tokens", "routed", "width")}

    def with_experts(self, number: int, keep_score: bool) -> CondensedLayer:
        """Return the layer with its first experts only, those that a search for fewer would have chosen.

        Args:
            number (`int`): Number of experts.
            keep_score (`bool`): Whether the score still applies.
        """
        scores, tokens = self.expert_scores, self.tokens
        return CondensedLayer(
            layer=self.layer,
            experts=self.experts[:number],
            gates=self.gates[:number],
            score=self.score if keep_score else None,
            expert_scores=None if scores is None else scores[: number + 1],
            tokens=None if tokens is None else tokens[:number],
            routed=self.routed,
        )


def layers_of(spread: Spread, chosen: Mapping[int, Choice]) -> list[CondensedLayer]:
    """Make the layers of a plan, by depth, in which the layers of a model take these forms."""
    rows = {row.layer: row for row in spread.layers}
    changed = {layer: choice for layer, choice in chosen.items() if choice != rows[layer].untouched}
    return [
        CondensedLayer(layer, [], [], routed=rows[layer].stay(choice.routed), width=choice.width)
        for layer, choice in sorted(changed.items())
    ]


def size_restrictions(config: Mapping[str, Any], model: ModelShape | None) -> dict[str, bool]:
    """Return the arguments of `Spread.solve` beside the size: an export needs the same form in all layers."""
    alike = config.get("exportable") is not None
    return {"alike": alike, "beside": not alike or model is None or model.has_shared}
