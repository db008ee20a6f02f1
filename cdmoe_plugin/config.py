"""The configuration of a search: the numbers of layers and experts, and how they are chosen."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Any, Literal, get_type_hints

from .checks import is_int
from .presets import PRESETS
from .registry import REGISTRIES
from .sizes import read_budget, read_share, read_target

# Fields that take a number or text.
_NUMBERS_OR_WORDS = ("num_experts", "expert_budget", "num_samples", "target_size")

# Fields that have no meaning beside `target_size`.
BESIDE_TARGET = ("num_layers", "num_experts", "num_routed", "layers", "expert_budget")

# What becomes of a chosen layer.
FORMS = ("condense", "prune_experts", "trim_layer", "trim_block")
# How the layer search compares candidates.
LAYER_SEARCHES = ("race", "full")


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
        num_routed (`int`, defaults to 0): Number M of experts that stay behind the router of each chosen layer; 0 as in
            the paper. The others are condensed: of them, the dense part keeps `num_experts` experts chosen by the most
            tokens, or as many neurons with `refit_neurons`; no experts are searched. At least the router's experts per
            token, and a multiple of its groups.
        routed_selection (`str`, defaults to `"frequency"`): How the experts that stay are chosen, also for a
            `target_size`.
        form (`str`, defaults to `"condense"`): What becomes of a chosen layer. The other values are baselines:
            "prune_experts" drops all experts but `num_routed`, "trim_layer" the MLP sub-layer (the residual stays) and
            "trim_block" the whole decoder layer. They search no experts, so `num_experts`, `expert_selection` and
            `gates` have no effect.
        expert_budget (`int` or `str`, *optional*): Only with `num_experts="auto"`: the total that all condensed layers
            may keep, as a number of routed experts (54), of their parameters ("300M params") or of their bytes in the
            model's dtype ("2GB", "500MiB"). The layer search uses the same K for all layers. The budget is then spread
            so that each expert goes where it helps most, and the spread is kept if it brings the model's output on the
            calibration data closer than the same K everywhere. If the refit chooses single neurons, these are spread
            instead, by the errors that each number of them leaves.
        target_size (`float` or `str`, *optional*): Size of the whole condensed model, at most: a share of the sparse
            model's parameters (0.64), a number of them ("11B params") or bytes of weights in the model's dtype
            ("24GB"). The search then decides what becomes of every sparse layer, so that the model's output changes
            least; `num_layers`, `num_experts`, `layers` and `expert_budget` have no meaning. Needs a `refit` that
            chooses single neurons, as in `best` and `fast`.
        expert_selection (`str`, defaults to `"greedy"`): How experts are chosen; "greedy" is Algorithm 1. The methods
            for this field and the others that name one are listed in docs/methods.md.
        layer_selection (`str`, defaults to `"greedy"`): How layers are chosen; "greedy" is Algorithm 2.
        layer_search (`str`, defaults to `"race"`): How a round of the greedy layer search (or of one for an export)
            compares candidates. "race" drops those that are certainly not the best after a part of the calibration
            sequences; "full" measures all of them on all sequences, as the paper does. Both choose the same layers.
        metric (`str`, defaults to `"js"`): The divergence between the outputs of the sparse and the condensed form that
            the searches minimise. "ppl" is defined on the model's output only: the layer search uses it and ignores
            `compare`, the expert search uses "js" as in the paper, and `layer_selection="local"` is not supported.
        compare (`str`, defaults to `"hidden"`): Output of the model that the layer search compares; "hidden" as in the
            published code.
        gates (`str`, defaults to `"mean"`): How the gates of the kept experts are set; "mean" is Eq. 2. With "sigmoid",
            which needs a `refit`, condensed layers have a gate per token for each expert beside these constants. They
            are then no plain MLPs, and can't be exported.
        refit (`str`, *optional*): How condensed layers are fitted to the sparse model afterwards, on the calibration
            data. Not at all if None, as in the paper.
        refit_neurons (`str`, defaults to `"experts"`): With `refit`, how the routed neurons of each condensed layer are
            chosen. "energy" and "least_squares" choose single neurons of all experts, as many as `num_experts`
            experts have, each with its expert's gate. No experts are searched then, and `expert_selection` has no
            effect: the plan names the experts chosen by the most tokens, with which the layer search condenses layers.
        refit_target (`str`, defaults to `"model"`): The target of the fit: "model" is the unmodified model's hidden
            states after the layer, which also corrects errors of the condensed layers before it; "block" is the output
            of the sparse block for the same inputs.
        refit_steps (`int`, defaults to 600): Maximum number of steps of `refit="distill"` per layer.
        num_samples (`int` or `"auto"`, defaults to 100): Maximum number of calibration samples. "auto" draws as many
            as there are 51,200 tokens in, or with a refit 30 tokens for each neuron of the widest condensed layer. With
            a refit, the searches use at most 51,200 tokens, the paper's number, of them.
        max_length (`int`, defaults to 512): Maximum number of tokens per calibration sample.
        batch_size (`int`, defaults to 8): Calibration samples per forward pass; one of more than 2,048 tokens counts as
            several.
        seed (`int`, defaults to 0): Seed of every random choice, such as the draw of the samples.
        exportable (`str`, *optional*): An export target ("stock", "dense", "top_k", "gguf"). The layer search then
            chooses only layers with which the result can be exported: those that the config of the base architecture
            can mark as dense ("stock"; with `form="trim_block"`, whole periods of layers), the first sparse ones
            ("gguf"), or all. The cost, in divergence of the model's output against the free choice, is logged.
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
    num_routed: int = _help("Experts that stay behind the router of each chosen layer; the others are condensed.", 0)
    routed_selection: str = _help("How the experts that stay behind the router are chosen", "frequency")
    form: str = _help(
        "What becomes of a chosen layer: condense, prune_experts (keep num_routed), trim_layer (drop its MLP) or "
        "trim_block (drop the decoder layer).",
        "condense",
    )
    expert_budget: int | str | None = _help(
        "With num_experts=auto: total of all layers, in experts (54), parameters (300M params) or bytes (2GB, 500MiB).",
        None,
    )
    target_size: float | str | None = _help(
        "Size of the whole model, at most: a share of its parameters (0.64), parameters (11B params) or bytes (24GB). "
        "Decides what becomes of every sparse layer, instead of num_layers, num_experts, layers and expert_budget.",
        None,
    )
    expert_selection: str = _help("How experts are chosen", "greedy")
    layer_selection: str = _help("How layers are chosen", "greedy")
    layer_search: str = _help(
        "Compare candidate layers in a race, which drops hopeless ones early, or in full on all calibration tokens.",
        "race",
    )
    metric: str = _help("Divergence that the searches minimise", "js")
    compare: str = _help("Model output that the layer search compares", "hidden")
    gates: str = _help("How the gates of the kept experts are set", "mean")
    refit: str | None = _help("How condensed layers are fitted to the sparse model (not at all if unset)", None)
    refit_neurons: str = _help("With refit: how the routed neurons of condensed layers are chosen", "experts")
    refit_target: str = _help(
        "Target of the fit: model (hidden states of the unmodified model) or block (output of the sparse block).",
        "model",
    )
    refit_steps: int = _help("Maximum number of steps of refit=distill per layer.", 600)
    num_samples: int | Literal["auto"] = _help(
        "Maximum number of calibration samples; auto draws 30 tokens for each neuron of a refitted layer.", 100
    )
    max_length: int = _help("Maximum number of tokens per calibration sample.", 512)
    batch_size: int = _help("Calibration samples per forward pass.", 8)
    seed: int = _help("Seed of every random choice, such as the draw of the samples.", 0)
    exportable: str | None = _help("Choose only layers with which the result can be exported as this target", None)
    cache_memory: str = _help(
        "Memory for intermediate results of a search, such as 4GB; less is slower and gives the same plan.", "4GB"
    )

    def __post_init__(self) -> None:
        if self.target_size is not None:
            self._check_target()
        if self.layers is not None:
            self._check_layers()
            self.num_layers = len(self.layers)
        self._check_budget()
        for name, least in (
            ("num_layers", 1),
            ("num_experts", 0),
            ("num_routed", 0),
            ("num_samples", 1),
            ("max_length", 2),
            ("batch_size", 1),
            ("refit_steps", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if (name, value) in (("num_experts", "auto"), ("num_samples", "auto")):
                continue
            if not is_int(value) or not least <= value < 2**63:
                raise ValueError(f"`{name}` should be a whole number of at least {least}, but is {value!r}.")
        methods = ("expert_selection", "layer_selection", "metric", "compare", "gates", "refit", "refit_neurons")
        for name in (*methods, "routed_selection", "refit_target", "exportable"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name, value) not in (("refit", None), ("exportable", None)):
                raise ValueError(f"`{name}` should be a name, but is {value!r}.")
        for name, values in (("form", FORMS), ("layer_search", LAYER_SEARCHES)):
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but only {', '.join(map(repr, values))} exist.")
        self._check_routed()
        self.cache_bytes  # noqa: B018  (raises if `cache_memory` is not a size)

    def _check_routed(self) -> None:
        if self.form == "prune_experts" and not self.num_routed:
            raise ValueError("`form='prune_experts'` needs `num_routed`, the number of experts to keep, but it is 0.")
        if self.num_routed and self.form.startswith("trim"):
            raise ValueError(
                f"`num_routed` is {self.num_routed}, but with `form={self.form!r}` no experts stay: leave it out."
            )
        if self.num_routed and self.gates == "sigmoid":
            raise ValueError(
                f"`gates` is 'sigmoid', but with `num_routed={self.num_routed}` the router alone weighs experts for "
                "each token: use `gates='mean'`."
            )
        if self.num_routed and self.num_experts == "auto":
            raise ValueError(
                "`num_experts` is 'auto', but with `num_routed` all layers keep the same number: set it, or use "
                "`target_size` instead of both."
            )

    def _check_layers(self) -> None:
        layers = self.layers
        if not isinstance(layers, (list, tuple)) or not layers or not all(map(is_int, layers)):
            raise ValueError(f"`layers` should be a list of decoder layer indices, but is {layers!r}.")
        self.layers = list(layers)
        doubled = sorted({layer for layer in self.layers if self.layers.count(layer) > 1})
        if doubled:
            raise ValueError(f"`layers` names {doubled} more than once: {layers}.")

    def _check_target(self) -> None:
        read_target(self.target_size, 10**15, 1)
        usual = {f.name: f.default for f in fields(self)}
        for name in (*BESIDE_TARGET, "form"):
            if getattr(self, name) != usual[name]:
                raise ValueError(
                    f"`target_size` decides what becomes of every layer, so that `{name}` has no meaning beside it, "
                    f"but is {getattr(self, name)!r}: leave one of them out."
                )

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
    def paper(cls, **changes: Any) -> CondenseConfig:
        """Return the paper's main setting (CD-MoE, arXiv 2412.00069, section 4), independently of the defaults.

        Args:
            **changes: Fields with other values.
        """
        return cls(**{**PRESETS["paper"], **changes})

    @classmethod
    def best(cls, **changes: Any) -> CondenseConfig:
        """Return the setting for the best condensed model: neurons chosen by least squares, then distilled.

        Args:
            **changes: Fields with other values.
        """
        return cls(**{**PRESETS["best"], **changes})

    @classmethod
    def fast(cls, **changes: Any) -> CondenseConfig:
        """Return a setting that takes little time: neurons chosen by energy, with a refit in closed form.

        Args:
            **changes: Fields with other values.
        """
        return cls(**{**PRESETS["fast"], **changes})

    def check_given(self, given: Collection[str]) -> None:
        """Check that fields set by the user, even to their defaults, have a meaning beside `target_size`.

        Raises:
            ValueError: naming them.
        """
        unused = [name for name in BESIDE_TARGET if name in given]
        if self.target_size is not None and unused:
            raise ValueError(f"`target_size` decides what becomes of every layer: leave out {unused}.")

    @property
    def needs_calibration(self) -> bool:
        """Whether there is anything to search: dropping given layers needs no data."""
        return not self.form.startswith("trim") or self.layers is None

    @property
    def searches_experts(self) -> bool:
        """Whether experts are searched: not if layers are trimmed or made of single neurons, or if experts stay."""
        return self.form == "condense" and self.refit_neurons == "experts" and not self.num_routed

    @property
    def dense_experts(self) -> int | Literal["auto"]:
        """The value of `num_experts`, or 0 if other experts than those behind the router are dropped."""
        return 0 if self.form == "prune_experts" else self.num_experts

    @property
    def gates_tokens(self) -> bool:
        """Whether condensed layers have gates per token for their routed experts, beside constant ones."""
        return self.gates == "sigmoid"

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
        registry = REGISTRIES.get("export" if f.name == "exportable" else f.name)
        methods = f": {registry.summary()}." if registry is not None else ""
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
            elif isinstance(value, str) and name.endswith("target_size"):
                setattr(self, name, read_share(value))

    return make_dataclass("CondenseConfigArguments", rows, namespace={"__post_init__": read_numbers})


def unused_with_plan(given: Mapping[str, Any], reads: bool = False) -> list[str]:
    """Find the fields set by the user that have no effect when a plan replaces the search.

    A refit still needs calibration data, and therefore the fields that describe how it is read.

    Args:
        given (`Mapping[str, Any]`): Fields of `CondenseConfig` that were set.
        reads (`bool`, defaults to `False`): Whether anything but a refit needs calibration data.
    """
    reading = ("num_samples", "max_length", "batch_size", "seed")
    used = {"num_layers", "num_experts", "target_size", "form", *(reading if reads else ())}
    if given.get("refit"):
        used |= {"gates", "refit", "refit_neurons", "refit_target", "refit_steps", "cache_memory", *reading}
    return sorted(set(given) - used)
