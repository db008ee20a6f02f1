"""Makes `lm_eval --model cdmoe` known to lm-eval releases that do not look for plugins yet (0.4.13 and before).

A bridge, and no part of the package `cdmoe_plugin`: `cdmoe_plugin_lm_eval.pth` runs `install` whenever Python starts,
so this module imports only what Python itself has imported by then, and stays out of the way until somebody imports
`lm_eval.models`. It then stores one name in lm-eval's registry; `cdmoe_plugin` itself is imported when that model is
asked for. A release of lm-eval that reads the entry point group `lm_eval.models` finds the model there, and nothing is
stored.

Setting the environment variable `CDMOE_NO_LM_EVAL_HOOK` switches it off.
"""

import os
import sys

TYPE_CHECKING = False  # as `typing` has it, which would be imported for nothing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

NAME = "cdmoe"
TARGET = "cdmoe_plugin.integrations.lm_eval_model:CDMoELM"
SWITCH = "CDMOE_NO_LM_EVAL_HOOK"
_AFTER = "lm_eval.models"


def install() -> None:
    """Has `register` called as soon as `lm_eval.models` has been imported."""
    if os.environ.get(SWITCH):
        return
    if _AFTER in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def register() -> None:
    """Tells lm-eval's registry where the model is, unless it knows or finds that out itself.

    Before the module `lm_eval.models` has run, this would do harm: lm-eval registers its own models only while the
    registry is empty.
    """
    try:
        from lm_eval.api import registry

        if not hasattr(registry, "load_plugins") and NAME not in registry.model_registry:
            registry.model_registry.register(NAME, target=TARGET)
    except Exception:
        # A release with another registry is no reason to break `import lm_eval`; without this line in the registry it
        # says by itself that it knows no such model.
        import logging

        logging.getLogger("lm_eval").debug("cdmoe could not be registered", exc_info=True)


class _AfterImport:
    """A finder that leaves finding to the others, and calls `register` when one module has been executed."""

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
        # Only now, as a mere search for the module would otherwise use the finder up.
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        register()

    try:
        # On the loader itself rather than in a loader of our own, so that everything else that it can do stays.
        spec.loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
    except AttributeError:
        return
