"""Registries of methods by name. Each method is one file of a package and registers itself."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Any)


@dataclass(frozen=True)
class Method(Generic[T]):
    """A registered method.

    Args:
        run: The method itself.
        help (`str`): Its description on one line, for help texts and the documentation.
        source (`str`): The paper that introduces it, if any.
        options (`tuple[str, ...]`): The config fields that it takes as keyword arguments.
    """

    run: T
    help: str
    source: str = ""
    options: tuple[str, ...] = ()


class Registry(MutableMapping[str, T]):
    """The methods that a config field may name, in alphabetical order. They are imported on first use.

    Args:
        field (`str`): The config field.
        package (`str`): The package whose modules register the methods.
        first (`str`): A method to list before the others, usually the default.
        others (`Registry`, *optional*): Methods of another kind that the same field may name.
    """

    def __init__(self, field: str, package: str, first: str = "", others: Registry[Any] | None = None) -> None:
        self.field = field
        self.package = package
        self.first = first
        self.others = others
        self._methods: dict[str, Method[T]] = {}
        self._complete = False

    def register(self, name: str, help: str, source: str = "", options: tuple[str, ...] = ()) -> Callable[[F], F]:
        """Register a method under a name, as a decorator; see `Method`.

        Raises:
            ValueError: if the name is taken.
        """

        def add(run: F) -> F:
            if name in self._methods:
                raise ValueError(f"`{self.field}` has a method {name!r} already: {self._methods[name].run}.")
            self._methods[name] = Method(run, help, source, options)
            return run

        return add

    def lookup(self, name: str) -> T:
        """Return the method with a name.

        Raises:
            ValueError: naming the config field and the methods that exist, if there is none with that name.
        """
        if name not in self:
            raise ValueError(f"`{self.field}` is {name!r}, but only {', '.join(map(repr, self.methods()))} exist.")
        return self[name]

    def of(self, config: Any) -> T:
        """Return the method that a config names, with its options filled in.

        Raises:
            ValueError: as `lookup`.
        """
        name = getattr(config, self.field)
        run: Any = self.lookup(name)
        options = {option: getattr(config, option) for option in self._methods[name].options}
        found: Any = partial(run, **options) if options else run
        return found

    def methods(self) -> dict[str, Method[Any]]:
        """Return all methods that the field may name, with their descriptions."""
        own = {name: self._methods[name] for name in self}
        return own if self.others is None else own | self.others.methods()

    def summary(self) -> str:
        """Describe the methods in one line: `greedy (adds ...), random (...)`."""
        return ", ".join(f"{name} ({method.help})" for name, method in self.methods().items())

    def _loaded(self) -> dict[str, Method[T]]:
        if not self._complete:
            for module in pkgutil.iter_modules(import_module(self.package).__path__):
                import_module(f"{self.package}.{module.name}")
            self._complete = True
        return self._methods

    def __getitem__(self, name: str) -> T:
        return self._loaded()[name].run

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._loaded(), key=lambda name: (name != self.first, name)))

    def __len__(self) -> int:
        return len(self._loaded())

    def __setitem__(self, name: str, run: T) -> None:
        """Replace a registered method; its description stays."""
        self._methods[name] = replace(self._loaded()[name], run=run)

    def __delitem__(self, name: str) -> None:
        del self._loaded()[name]


class ExportTarget(NamedTuple):
    """A kind of checkpoint to which a condensed model can be exported.

    Args:
        check (`Callable`): Raises an error if the result of a plan or a search could not be exported; see
            `check_export`.
        write (`Callable`): Writes a model to a folder; see `export_stock`.
    """

    check: Callable[..., None]
    write: Callable[..., Any]


EXPERT_SELECTIONS = Registry[Callable[..., Any]]("expert_selection", "cdmoe_plugin.search.experts", "greedy")
ROUTED_SELECTIONS = Registry[Callable[..., Any]]("routed_selection", "cdmoe_plugin.search.routed", "frequency")
LAYER_SELECTIONS = Registry[Callable[..., Any]]("layer_selection", "cdmoe_plugin.search.layers", "greedy")
# From the logits and token ids of the whole model, one value per sequence.
MODEL_METRICS = Registry[Callable[..., Any]]("metric", "cdmoe_plugin.metrics")
# From two outputs, of a layer or of the whole model, one value per token.
METRICS = Registry[Callable[..., Any]]("metric", "cdmoe_plugin.metrics", "js", MODEL_METRICS)
COMPARE = Registry[Callable[..., Any]]("compare", "cdmoe_plugin.search.layers", "hidden")
GATES = Registry[Callable[..., Any]]("gates", "cdmoe_plugin.search.gates", "mean")
REFITS = Registry[Callable[..., Any]]("refit", "cdmoe_plugin.condense.refit", "down_proj")
# Of the whole of a layer with experts behind its router, after its dense part is fitted by the first of `REFITS`.
MIXED_REFITS = Registry[Callable[..., Any]]("refit", "cdmoe_plugin.condense.refit")
REFIT_NEURONS = Registry[Callable[..., Any]]("refit_neurons", "cdmoe_plugin.condense.refit", "experts")
EXPORT_TARGETS = Registry[ExportTarget]("export", "cdmoe_plugin.export", "stock")

# By config field.
REGISTRIES: dict[str, Registry[Any]] = {
    registry.field: registry
    for registry in (
        EXPERT_SELECTIONS,
        LAYER_SELECTIONS,
        ROUTED_SELECTIONS,
        METRICS,
        COMPARE,
        GATES,
        REFITS,
        REFIT_NEURONS,
        EXPORT_TARGETS,
    )
}
