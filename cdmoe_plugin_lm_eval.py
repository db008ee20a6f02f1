"""A bridge to lm-eval releases without plugins (0.4.13 and earlier), for `lm_eval --model cdmoe`.

It is not part of the package `cdmoe_plugin`. `cdmoe_plugin_lm_eval.pth` runs `install` whenever Python starts, so this
module imports only what Python itself has imported by then, and does nothing until `lm_eval.models` is imported. It
then adds one name to lm-eval's registry; `cdmoe_plugin` itself is imported when that model is used. A release of
lm-eval that reads the entry point group `lm_eval.models` finds the model there, and nothing is added.

Setting the environment variable `CDMOE_NO_LM_EVAL_HOOK` switches it off.
"""

import os
import sys

TYPE_CHECKING = False  # like `typing.TYPE_CHECKING`, without the import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

NAME = "cdmoe"
TARGET = "cdmoe_plugin.integrations.lm_eval_model:CDMoELM"
SWITCH = "CDMOE_NO_LM_EVAL_HOOK"
_AFTER = "lm_eval.models"


def install() -> None:
    """Arrange that `register` is called as soon as `lm_eval.models` has been imported."""
    if os.environ.get(SWITCH):
        return
    if _AFTER in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def register() -> None:
    """Add the model to lm-eval's registry, unless it is there already or lm-eval reads entry points.

    Only call it after `lm_eval.models` has run: lm-eval registers its own models only while the registry is empty.
    """
    try:
        from lm_eval.api import registry

        if not hasattr(registry, "load_plugins") and NAME not in registry.model_registry:
            registry.model_registry.register(NAME, target=TARGET)
    except Exception:
        # A release with another registry must not break `import lm_eval`. It will report an unknown model itself.
        import logging

        logging.getLogger("lm_eval").debug("cdmoe could not be registered", exc_info=True)


class _AfterImport:
    """A finder that uses the other finders, and calls `register` after one module has been executed."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != _AFTER:
            return None
        for finder in list(sys.meta_path):
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                _call_after_execution(spec, self)
                return spec
        return None


def _call_after_execution(spec: "ModuleSpec", finder: _AfterImport) -> None:
    execute = getattr(spec.loader, "exec_module", None)
    if execute is None:
        return

    def exec_module(module: "ModuleType") -> None:
        execute(module)
        # Only now: the module may be searched for without being imported.
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        register()

    try:
        # On the loader itself rather than in a loader of our own, to keep all its other methods.
        spec.loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
    except AttributeError:
        return
