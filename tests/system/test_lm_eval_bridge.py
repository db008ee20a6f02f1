"""Finding `cdmoe`: in normal and editable installs, without .pth files, with other releases of lm-eval, when broken."""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from cdmoe_plugin.scripts.main import main
from tests.helpers.lm_eval_cases import (
    ROOT,
    Case,
    answers,
    evaluate,
    evaluate_from_shell,
    make_case,
    options,
    read_results,
    run,
    script,
)

BRIDGE = "cdmoe_plugin_lm_eval"
OFF = {"CDMOE_NO_LM_EVAL_HOOK": "1"}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("bridge"))


@pytest.fixture(scope="module")
def expected(case: Case) -> dict[str, Any]:
    return answers(evaluate(case, "hf", pretrained=case.condensed, device="cpu"))


def python(code: str, *flags: str, executable: object = sys.executable, **env: str) -> str:
    """What a program prints, to either stream."""
    done = run([executable, *flags, "-c", code], env)
    return done.stdout + done.stderr


# --- evaluating ---


def test_without_pth_files(
    case: Case, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.registry import model_registry

    monkeypatch.delitem(model_registry._objs, "cdmoe")
    monkeypatch.setattr(sys, "argv", ["cdmoe"])  # lm-eval reads it, so the command sets it
    given = [str(word) for word in options(case, tmp_path, f"pretrained={case.condensed}")]
    at = given.index("--model")
    assert given[at + 1] == "cdmoe"
    assert main(["evaluate", *given[:at], *given[at + 2 :]]) == 0
    assert answers(read_results(tmp_path)) == expected


@pytest.mark.slow
def test_normal_install(case: Case, expected: dict[str, Any], tmp_path: Path) -> None:
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"])
    own = tmp_path / "venv" / "bin" / "python"
    folder = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", executable=own).strip())
    # What else is needed, from the environment of the tests; .pth files in a folder that is added so are not processed.
    (folder / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert BRIDGE not in python("import sys; print(list(sys.modules))", executable=own)
    pip = [sys.executable, "-m", "pip", "--python", own, "--disable-pip-version-check"]
    run([*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel])
    assert {path.name for path in folder.iterdir()} >= {"cdmoe_plugin", f"{BRIDGE}.py", f"{BRIDGE}.pth"}
    said = run([own.with_name("cdmoe"), "estimate", "--help"], {"PYTHONSAFEPATH": "1", "PYTHONPATH": ""}).stdout
    assert "deepseek-moe-16b" in said  # a config that is in the wheel

    results, _ = evaluate_from_shell(
        case, [own, script("lm_eval")], tmp_path / "out", f"pretrained={case.condensed}", PYTHONSAFEPATH="1"
    )
    assert answers(results) == expected
    where = "import importlib.util; print(importlib.util.find_spec('cdmoe_plugin').origin)"
    assert python(where, "-I", executable=own).strip() == str(folder / "cdmoe_plugin" / "__init__.py")

    run([*pip, "uninstall", "--yes", "cdmoe_plugin"])
    assert [path.name for path in folder.iterdir() if "cdmoe" in path.name] == []
    assert python("pass", executable=own) == ""


# --- finding ---

STATE = "import sys, lm_eval.models; from lm_eval.api.registry import model_registry as models; "


def test_registered_when_lm_eval_is_imported() -> None:
    code = (
        "import sys, importlib.util, importlib, inspect; first = list(sys.meta_path); "
        "importlib.util.find_spec('lm_eval.models'); assert sys.meta_path == first; "  # a search does not use it up
        "assert 'lm_eval.models' not in sys.modules; " + STATE + "assert 'cdmoe' in models and 'hf' in models; "
        "assert len(first) - len(sys.meta_path) == 1; assert 'MODEL_MAPPING' in inspect.getsource(lm_eval.models); "
        "importlib.reload(lm_eval.models); assert 'cdmoe_plugin' not in sys.modules and 'torch' not in sys.modules"
    )
    assert python(code) == ""
    late = "import lm_eval.models, cdmoe_plugin_lm_eval as bridge; bridge.install(); "
    assert python(late + STATE + "assert 'cdmoe' in models") == ""


def test_switched_off() -> None:
    assert python(STATE + "assert 'cdmoe' not in models and 'hf' in models", **OFF) == ""
    code = "import cdmoe_plugin.integrations.lm_eval_model; " + STATE + "assert 'cdmoe' in models and 'hf' in models"
    assert python(code, **OFF) == ""


def test_steps_aside_where_lm_eval_finds_plugins() -> None:
    code = "import lm_eval.api.registry as r; r.load_plugins = print; " + STATE + "assert 'cdmoe' not in models"
    assert python(code) == ""
    from cdmoe_plugin.integrations.lm_eval_model import CDMoELM

    found = {entry.value: entry.load() for entry in entry_points(group="lm_eval.models", name="cdmoe")}
    assert found == {"cdmoe_plugin.integrations.lm_eval_model:CDMoELM": CDMoELM}


@pytest.mark.parametrize("registry", [None, "", "model_registry = 3", "raise OSError"])
def test_another_lm_eval_is_not_broken(tmp_path: Path, registry: str | None) -> None:
    for folder in ("lm_eval", "lm_eval/models", "lm_eval/api"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    if registry is not None:
        (tmp_path / "lm_eval/api/registry.py").write_text(registry)
    assert python("import lm_eval.models; print(lm_eval.__file__)", PYTHONPATH=str(tmp_path)).startswith(str(tmp_path))


# --- starting Python ---


def imported(code: str, *flags: str) -> set[str]:
    """Names of the modules that Python imports for a program."""
    lines = run([sys.executable, *flags, "-X", "importtime", "-c", code]).stderr.splitlines()
    return {line.rpartition("|")[2].strip() for line in lines}


def test_start_imports_nothing_heavy() -> None:
    at_start = imported("pass")
    assert BRIDGE in at_start
    assert not {name.split(".")[0] for name in at_start} & {"torch", "transformers", "cdmoe_plugin", "lm_eval"}
    bare = imported("import os, sys", "-I", "-S")
    assert imported(f"import os, sys; sys.path.append({str(ROOT)!r}); import {BRIDGE}", "-I", "-S") == bare | {BRIDGE}


@pytest.mark.parametrize(
    "module", [None, "raise RuntimeError", "this is no Python", "def install(): raise ImportError", "x = 1"]
)
def test_a_broken_bridge_is_silent(tmp_path: Path, module: str | None) -> None:
    line = (ROOT / f"{BRIDGE}.pth").read_text()
    assert line.count("\n") == 1
    (tmp_path / "bridge.pth").write_text(line + "import sys; sys.went_on = True\n")
    if module is not None:
        (tmp_path / f"{BRIDGE}.py").write_text(module)
    code = f"import site, sys; site.addsitedir({str(tmp_path)!r}); assert sys.went_on"
    assert python(code, "-I", "-S") == ""
