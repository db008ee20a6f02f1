"""A function that runs as soon as somebody imports a module, which this does not import itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def call_after_import(name: str, function: Callable[[], None]) -> None:
    """Call a function once a module has been imported: at once if it is there already.

    Args:
        name (`str`): The module's full name.
        function (`Callable`): Called without arguments, in the thread that imports the module.
    """
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _AfterImport(name, function))


class _AfterImport(MetaPathFinder):
    """A finder that leaves finding to the others, and adds a call to what the module's loader does."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self.name = name
        self.function = function

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            self._extend(spec.loader)
        return spec

    def _extend(self, loader: object) -> None:
        execute = loader.exec_module  # type: ignore[attr-defined]

        def exec_module(module: ModuleType) -> None:
            execute(module)
            # Only now: a mere search for the module, or an import that fails, should not use the finder up.
            if module.__name__ == self.name and self in sys.meta_path:
                sys.meta_path.remove(self)
                self.function()

        # On the loader itself rather than in a loader of our own, so that everything else that it can do stays.
        loader.exec_module = exec_module  # type: ignore[attr-defined]
