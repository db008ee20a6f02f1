"""The configuration of a search: the numbers of layers and experts, and how they are chosen."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Any, Literal, get_type_hints

from .checks import is_int
from .registry import REGISTRIES
from .sizes import read_budget

# Fields that take a number or text.
_NUMBERS_OR_WORDS = ("num_experts", "expert_budget")

# What becomes of a chosen layer.
FORMS = ("condense", "trim_layer", "trim_block")


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class CondenseConfig:
    """The settings for condensing a sparse model (CD-MoE, arXiv 2412.00069). The defaults are the paper's main setting.

    Args:
        num_layers (`int`, defaults to 9): Number of sparse layers to condense, chosen by `layer_selection`. Ignored if
            `layers` is given.
        num_experts (`int` or `"auto"`, defaults to 6): Number K of routed experts kept in each condensed layer; 0 keeps
            the shared expert only. "auto" chooses K for each layer, within `expert_budget`.
        layers (`list[int]`, *optional*): Decoder layers to condense (0 is the first decoder layer), in this order,
            without a layer search.
        form (`str`, defaults to `"condense"`): What becomes of a chosen layer. The other values are the paper's
            baselines: "trim_layer" drops its MLP sub-layer (the residual stays), "trim_block" the whole decoder layer.
            They search no experts, so `num_experts`, `expert_selection` and `gates` have no effect.
        expert_budget (`int` or `str`, *optional*): Only with `num_experts="auto"`: the total that all condensed layers
            may keep, as a number of routed experts (54), of their parameters ("300M params") or of their bytes in the
            model's dtype ("2GB", "500MiB"). The layer search uses the same K for all layers. The budget is then spread
            so that each expert goes where it helps most, and the spread is kept if it brings the model's output on the
            calibration data closer than the same K everywhere.
        expert_selection (`str`, defaults to `"greedy"`): How experts are chosen; "greedy" is Algorithm 1. The methods
            for this field and the next five are listed in docs/methods.md.
        layer_selection (`str`, defaults to `"greedy"`): How layers are chosen; "greedy" is Algorithm 2.
        metric (`str`, defaults to `"js"`): The divergence between the outputs of the sparse and the condensed form that
            the searches minimise. "ppl" is defined on the model's output only: the layer search uses it and ignores
            `compare`, the expert search uses "js" as in the paper, and `layer_selection="local"` is not supported.
        compare (`str`, defaults to `"hidden"`): Output of the model that the layer search compares; "hidden" as in the
            published code.
        gates (`str`, defaults to `"mean"`): How the constant gates are set; "mean" is Eq. 2.
        refit (`str`, *optional*): How condensed layers are fitted to the sparse model afterwards, on the calibration
            data. Not at all if None, as in the paper.
        refit_target (`str`, defaults to `"model"`): The target of the fit: "model" is the unmodified model's hidden
            states after the layer, which also corrects errors of the condensed layers before it; "block" is the output
            of the sparse block for the same inputs.
        refit_steps (`int`, defaults to 300): Maximum number of steps of `refit="distill"` per layer.
        num_samples (`int`, defaults to 100): Maximum number of calibration samples.
        max_length (`int`, defaults to 512): Maximum number of tokens per calibration sample.
        batch_size (`int`, defaults to 8): Calibration samples per forward pass.
        seed (`int`, defaults to 0): Seed of every random choice, such as the draw of the samples.
        cache_memory (`str`, defaults to `"4GB"`): Memory for intermediate results that a search keeps instead of
            computing them again (expert outputs, hidden states between layers). Less memory makes the search slower and
            gives the same plan.

    Raises:
        ValueError: if a field has a wrong type or value. The names of methods are checked when they are used.
    """

    num_layers: int = _help("Number of sparse layers to condense (without `layers`).", 9)
    num_experts: int | Literal["auto"] = _help(
        "Routed experts kept in each condensed layer; 0 keeps the shared expert only, auto spreads `expert_budget`.", 6
    )
    layers: list[int] | None = _help(
        "Decoder layers to condense (0 is the first), in this order, instead of a layer search.", None
    )
    form: str = _help(
        "What becomes of a chosen layer: condense, trim_layer (drop its MLP) or trim_block (drop the decoder layer).",
        "condense",
    )
    expert_budget: int | str | None = _help(
        "With num_experts=auto: total of all layers, in experts (54), parameters (300M params) or bytes (2GB, 500MiB).",
        None,
    )
    expert_selection: str = _help("How experts are chosen", "greedy")
    layer_selection: str = _help("How layers are chosen", "greedy")
    metric: str = _help("Divergence that the searches minimise", "js")
    compare: str = _help("Model output that the layer search compares", "hidden")
    gates: str = _help("How the constant gates are set", "mean")
    refit: str | None = _help("How condensed layers are fitted to the sparse model (not at all if unset)", None)
    refit_target: str = _help(
        "Target of the fit: model (hidden states of the unmodified model) or block (output of the sparse block).",
        "model",
    )
    refit_steps: int = _help("Maximum number of steps of refit=distill per layer.", 300)
    num_samples: int = _help("Maximum number of calibration samples.", 100)
    max_length: int = _help("Maximum number of tokens per calibration sample.", 512)
    batch_size: int = _help("Calibration samples per forward pass.", 8)
    seed: int = _help("Seed of every random choice, such as the draw of the samples.", 0)
    cache_memory: str = _help(
        "Memory for intermediate results of a search, such as 4GB; less is slower and gives the same plan.", "4GB"
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
        self.cache_bytes  # noqa: B018  (raises if `cache_memory` is not a size)

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
                    f"`expert_budget` is {self.expert_budget!r} and needs `num_experts='auto'`, but `num_experts` is "
                    f"{self.num_experts!r}."
                )
        elif self.num_experts == "auto":
            raise ValueError(
                "`num_experts='auto'` needs an `expert_budget`, such as 54 (experts), '300M params' or '2GB'."
            )

    @classmethod
    def paper(cls) -> CondenseConfig:
        """Return the paper's main setting (CD-MoE, arXiv 2412.00069, section 4), independently of the defaults."""
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
        """Whether there is anything to search: dropping given layers needs no data."""
        return self.form == "condense" or self.layers is None

    @property
    def cache_bytes(self) -> int:
        """The value of `cache_memory` in bytes."""
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
        """Convert the config to JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CondenseConfig:
        """Make a config from the values that `to_dict` returns.

        Raises:
            ValueError: if a key is not a field of this class, or a value is not valid for its field.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"A CondenseConfig is made from a mapping of its fields, not from {values!r}.")
        unknown = sorted(set(values) - {f.name for f in fields(cls)}, key=str)
        if unknown:
            raise ValueError(f"CondenseConfig has no field {', '.join(map(repr, unknown))}.")
        return cls(**values)


def condense_arguments(prefix: str = "", names: Collection[str] | None = None) -> type:
    """Make a dataclass of `CondenseConfig`'s fields for `HfArgumentParser` or `TrlParser`, all None by default.

    Args:
        prefix (`str`, defaults to `""`): Prefix of every name, for parsers with other arguments of the same names.
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
    numbers_or_words = [prefix + name for name in _NUMBERS_OR_WORDS if names is None or name in names]

    # The parsers know one type per argument, and take text where a number is allowed as well.
    def read_numbers(self: Any) -> None:
        for name in numbers_or_words:
            value = getattr(self, name)
            if isinstance(value, str) and value.strip().removeprefix("-").isdecimal():
                setattr(self, name, int(value))

    return make_dataclass("CondenseConfigArguments", rows, namespace={"__post_init__": read_numbers})


def unused_with_plan(given: Mapping[str, Any], reads: bool = False) -> list[str]:
    """Find the fields set by the user that have no effect when a plan replaces the search.

    A refit still needs calibration data, and therefore the fields that describe how it is read.

    Args:
        given (`Mapping[str, Any]`): Fields of `CondenseConfig` that were set.
        reads (`bool`, defaults to `False`): Whether anything but a refit needs calibration data.
    """
    reading = ("num_samples", "max_length", "batch_size", "seed")
    used = {"num_layers", "num_experts", "form", *(reading if reads else ())}
    if given.get("refit"):
        used |= {"refit", "refit_target", "refit_steps", "cache_memory", *reading}
    return sorted(set(given) - used)
