"""What the user asks for: how many layers and experts, and how they are chosen."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Any, Literal, get_type_hints

from .checks import is_int
from .registry import REGISTRIES
from .sizes import read_budget

# Fields that are a whole number or text.
_NUMBERS_OR_WORDS = ("num_experts", "expert_budget")

# What becomes of a chosen layer.
FORMS = ("condense", "trim_layer", "trim_block")


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class CondenseConfig:
    """How to condense a sparse model (CD-MoE, arXiv 2412.00069); the defaults are the paper's headline.

    Args:
        num_layers (`int`, defaults to 9): Sparse layers to condense, chosen by `layer_selection`. Ignored if
            `layers` is given.
        num_experts (`int` or `"auto"`, defaults to 6): Routed experts K kept per condensed layer; 0 keeps the shared
            expert only. "auto" gives each layer its own K, within `expert_budget`.
        layers (`list[int]`, *optional*): Decoder layer indices to condense (0 is the first decoder layer), in this
            order and without a layer search.
        form (`str`, defaults to `"condense"`): What becomes of a chosen layer. The other values are the paper's
            baselines: "trim_layer" drops its MLP sub-layer (the residual stays), "trim_block" the whole decoder layer.
            They search no experts: `num_experts`, `expert_selection` and `gates` then mean nothing.
        expert_budget (`int` or `str`, *optional*): With `num_experts="auto"`, and only then: what the condensed layers
            may keep together, as a number of routed experts (54), of their parameters ("300M params") or of their
            bytes in the model's dtype ("2GB", "500MiB"). Layers are searched with the same K for all; then experts go
            where they gain most, and what the model's output says on the calibration data decides between the two.
        expert_selection (`str`, defaults to `"greedy"`): How experts are chosen; "greedy" is Algorithm 1. The other
            methods, and those of the next five fields, are listed in docs/methods.md.
        layer_selection (`str`, defaults to `"greedy"`): How layers are chosen; "greedy" is Algorithm 2.
        metric (`str`, defaults to `"js"`): What the searches minimise between the outputs of the sparse and the
            condensed form. "ppl" is defined on the model's output only: it is for the layer search, whatever `compare`
            says, the expert search then uses "js" as in the paper, and `layer_selection="local"` can't be combined
            with it.
        compare (`str`, defaults to `"hidden"`): Output of the model that the layer search compares: "hidden" as in the
            published code.
        gates (`str`, defaults to `"mean"`): How the constant gates are set; "mean" is Eq. 2.
        refit (`str`, *optional*): How condensed layers are fitted to the sparse model afterwards, on the calibration
            data. None: not at all, as in the paper.
        refit_target (`str`, defaults to `"model"`): What they are fitted to: "model", the hidden states of the
            unmodified model behind the layer, so that errors of condensed layers below are made up for; or "block",
            what the sparse block gives for the same inputs.
        refit_steps (`int`, defaults to 300): Steps of `refit="distill"` per layer, at most.
        num_samples (`int`, defaults to 100): Calibration samples to use, at most.
        max_length (`int`, defaults to 512): Tokens per calibration sample, at most.
        batch_size (`int`, defaults to 8): Calibration samples per forward pass.
        seed (`int`, defaults to 0): Seed of every random choice, such as which samples are drawn.
        cache_memory (`str`, defaults to `"4GB"`): Memory for intermediate results that a search keeps instead of
            computing them again (expert outputs, hidden states at layer boundaries), per search. Less is slower and
            gives the same plan.

    Raises:
        ValueError: if a field has a wrong type or value. Names of methods are checked where they are registered.
    """

    num_layers: int = _help("Number of sparse layers to condense (without `layers`).", 9)
    num_experts: int | Literal["auto"] = _help(
        "Routed experts kept in each condensed layer; 0 keeps the shared expert only, auto spreads `expert_budget`.", 6
    )
    layers: list[int] | None = _help(
        "Decoder layers to condense (0 is the first), in this order, instead of a layer search.", None
    )
    form: str = _help(
        "What becomes of a chosen layer: condense, trim_layer (MLP dropped) or trim_block (decoder layer dropped).",
        "condense",
    )
    expert_budget: int | str | None = _help(
        "With num_experts=auto: total of all layers in experts (54), parameters (300M params) or bytes (2GB, 500MiB).",
        None,
    )
    expert_selection: str = _help("How experts are chosen", "greedy")
    layer_selection: str = _help("How layers are chosen", "greedy")
    metric: str = _help("Divergence that the searches minimise", "js")
    compare: str = _help("Model output that the layer search compares", "hidden")
    gates: str = _help("How the constant gates are set", "mean")
    refit: str | None = _help("How condensed layers are fitted afterwards (not at all if unset)", None)
    refit_target: str = _help(
        "What they are fitted to: model (hidden states of the unmodified model) or block (the sparse block).", "model"
    )
    refit_steps: int = _help("Steps of refit=distill per layer, at most.", 300)
    num_samples: int = _help("Calibration samples to use, at most.", 100)
    max_length: int = _help("Tokens per calibration sample, at most.", 512)
    batch_size: int = _help("Calibration samples per forward pass.", 8)
    seed: int = _help("Seed of every random choice, such as which samples are drawn.", 0)
    cache_memory: str = _help(
        "Memory for what a search keeps instead of computing it again, such as 4GB; less is slower, same plan.",
        "4GB",
    )

    def __post_init__(self) -> None:
        if self.layers is not None:
            self._check_layers()
            self.num_layers = len(self.layers)
        self._check_budget()
        for name, least in (
            ("num_layers", 1),
            ("num_experts", 0),
            ("num_samples", 1),
            ("max_length", 2),
            ("batch_size", 1),
            ("refit_steps", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if (name, value) == ("num_experts", "auto"):
                continue
            if not is_int(value) or not least <= value < 2**63:
                raise ValueError(f"`{name}` should be a whole number of at least {least}, but is {value!r}.")
        for name in ("expert_selection", "layer_selection", "metric", "compare", "gates", "refit", "refit_target"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name, value) != ("refit", None):
                raise ValueError(f"`{name}` should be a name, but is {value!r}.")
        if self.form not in FORMS:
            raise ValueError(f"`form` is {self.form!r}, but only {', '.join(map(repr, FORMS))} exist.")
        self.cache_bytes  # noqa: B018  (raises where `cache_memory` is not a size)

    def _check_layers(self) -> None:
        layers = self.layers
        if not isinstance(layers, (list, tuple)) or not layers or not all(map(is_int, layers)):
            raise ValueError(f"`layers` should be a list of decoder layer indices, but is {layers!r}.")
        self.layers = list(layers)
        doubled = sorted({layer for layer in self.layers if self.layers.count(layer) > 1})
        if doubled:
            raise ValueError(f"`layers` names {doubled} more than once: {layers}.")

    def _check_budget(self) -> None:
        if self.expert_budget is not None:
            read_budget(self.expert_budget)
            if self.num_experts != "auto":
                raise ValueError(
                    f"`expert_budget` is {self.expert_budget!r}, which goes with `num_experts='auto'` only, but "
                    f"`num_experts` is {self.num_experts!r}."
                )
        elif self.num_experts == "auto":
            raise ValueError(
                "`num_experts='auto'` needs an `expert_budget`, such as 54 (experts), '300M params' or '2GB'."
            )

    @classmethod
    def paper(cls) -> CondenseConfig:
        """The settings of the paper's headline (CD-MoE, arXiv 2412.00069, section 4), whatever the defaults are."""
        return cls(
            num_layers=9,
            num_experts=6,
            expert_selection="greedy",
            layer_selection="greedy",
            metric="js",
            compare="hidden",
            gates="mean",
            refit=None,
            num_samples=100,
            max_length=512,
            seed=0,
        )

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is left to search: layers that are named and only dropped need no data."""
        return self.form == "condense" or self.layers is None

    @property
    def cache_bytes(self) -> int:
        """`cache_memory` in bytes."""
        from accelerate.utils import convert_file_size_to_int

        try:
            if not isinstance(self.cache_memory, str):
                raise TypeError("not a string")
            size = convert_file_size_to_int(self.cache_memory)
            if size < 0:
                raise ValueError("below 0")
            return size
        except (ValueError, AttributeError, TypeError, OverflowError) as error:
            raise ValueError(
                f"`cache_memory` should be a size such as '4GB' or '500MiB', but is {self.cache_memory!r}."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CondenseConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: if a key is no field of this class, or a value none for its field.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"A CondenseConfig is made of an object's fields, not of {values!r}.")
        unknown = sorted(set(values) - {f.name for f in fields(cls)}, key=str)
        if unknown:
            raise ValueError(f"CondenseConfig has no field {', '.join(map(repr, unknown))}.")
        return cls(**values)


def condense_arguments(prefix: str = "", names: Collection[str] | None = None) -> type:
    """A dataclass of `CondenseConfig`'s fields for `HfArgumentParser` or `TrlParser`, each None where it is not given.

    Args:
        prefix (`str`, defaults to `""`): Put before every name, where the parser has other arguments of the same names.
        names (`Collection[str]`, *optional*): Fields to take; all of them by default.
    """
    hints = get_type_hints(CondenseConfig)
    rows: list[Any] = []
    for f in fields(CondenseConfig):
        if names is not None and f.name not in names:
            continue
        methods = f": {REGISTRIES[f.name].summary()}." if f.name in REGISTRIES else ""
        help_text = f.metadata["help"] + methods + ("" if f.default is None else f" (default: {f.default})")
        hint = int | str if f.name in _NUMBERS_OR_WORDS else hints[f.name]
        rows.append((prefix + f.name, hint | None, field(default=None, metadata={"help": help_text})))
    numbers_or_words = [prefix + name for name in _NUMBERS_OR_WORDS]

    # The parsers have one type per argument, and take text where a number is allowed as well.
    def read_numbers(self: Any) -> None:
        for name in numbers_or_words:
            value = getattr(self, name)
            if isinstance(value, str) and value.strip().removeprefix("-").isdecimal():
                setattr(self, name, int(value))

    return make_dataclass("CondenseConfigArguments", rows, namespace={"__post_init__": read_numbers})


def unused_with_plan(given: Mapping[str, Any], reads: bool = False) -> list[str]:
    """Which of the fields that a user gave do nothing where a plan takes the place of a search.

    A refit still needs calibration data, and with it whatever says how that is read.

    Args:
        given (`Mapping[str, Any]`): Fields of `CondenseConfig` that were set.
        reads (`bool`, defaults to `False`): Whether something else than a refit needs calibration data.
    """
    reading = ("num_samples", "max_length", "batch_size", "seed")
    used = {"num_layers", "num_experts", "form", *(reading if reads else ())}
    if given.get("refit"):
        used |= {"refit", "refit_target", "refit_steps", "cache_memory", *reading}
    return sorted(set(given) - used)
