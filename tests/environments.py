"""Run the unit layer and a test per main path with the oldest or the newest releases that pyproject.toml allows.

    python -m tests.environments lowest .cache/lowest
    python -m tests.environments newest .cache/newest

The second argument is where the virtual environment is made, or found. `--torch` names the release of torch for both:
which builds an index has depends on the machine.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("calibration", "plot", "recipes", "quantize", "lm-eval", "dev")  # not docs: no user of the package needs it
TESTS = [
    "tests/unit",
    # opening with the package, as remote code, and what version 0.1 wrote
    "tests/system/test_opening.py::test_with_the_package",
    "tests/system/test_opening.py::test_as_remote_code",
    "tests/system/test_version_0_1.py",
    # searching and condensing
    "tests/models/test_search.py::test_search_is_the_naive_one",
    "tests/recipes/test_recipe.py::test_search_and_save_from_a_config_file",
    # recovering
    "tests/recipes/test_lm_then_sft.py::test_both_stages",
    "tests/recipes/test_recovery_runs.py::test_lora_begins_from_the_seed",
    "tests/recipes/test_examples.py::test_in_peft",
    # saving quantised weights, exporting
    "tests/models/test_quantized.py::test_saved_and_opened_again",
    "tests/models/test_export.py::test_opens_without_this_package",
    "tests/recipes/test_recipe_export.py::test_both_checkpoints",
    # evaluating
    "tests/models/test_lm_eval.py::test_a_condensed_checkpoint_answers_as_with_hf",
    "tests/system/test_lm_eval_bridge.py::test_registered_when_lm_eval_is_imported",
]


def lower_bounds() -> dict[str, str]:
    """The lower bound of each requirement, by its name (with its extras), torch first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = project["dependencies"] + [requirement for extra in EXTRAS for requirement in extras[extra]]
    bounds = (re.fullmatch(r"([\w.-]+(?:\[[\w,-]+\])?)>=([\w.]+)", requirement) for requirement in requirements)
    return dict(bound.groups() for bound in bounds if bound)


def make(environment: Path, lowest: bool, torch_release: str) -> Path:
    """Make the virtual environment, unless it is there, and return its Python."""
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    bounds = lower_bounds()
    bounds.pop("torch")
    torch = f"torch=={torch_release}"  # first and alone: another order may pull in a build for another machine
    others = [f"{name}=={version}" for name, version in bounds.items()] if lowest else ["--upgrade", *bounds]
    for arguments in ([torch], [torch, *others], ["--no-deps", "--editable", str(ROOT)]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", choices=["lowest", "newest"])
    parser.add_argument("environment", type=Path)
    parser.add_argument("--torch", default="2.13.0", help="release of torch (2.13.0)")
    arguments = parser.parse_args()
    python = make(arguments.environment.absolute(), arguments.releases == "lowest", arguments.torch)
    names = [name.split("[")[0] for name in lower_bounds()]
    code = "import sys, importlib.metadata as m; print(*(f'{n}=={m.version(n)}' for n in sys.argv[1:]), sep='\\n')"
    subprocess.run([python, "-c", code, *names], check=True)
    threads = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run([python, "-m", "pytest", *TESTS], cwd=ROOT, env=threads).returncode


if __name__ == "__main__":
    raise SystemExit(main())
