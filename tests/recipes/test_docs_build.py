"""The documentation builds without a warning, and its reference has every public name that the pages mention."""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import cdmoe_plugin
from tests.helpers.docs_pages import PAGES, blocks_of
from tests.helpers.lm_eval_cases import ROOT

pytest.importorskip("sphinx")
pytest.importorskip("myst_parser")
pytest.importorskip("furo")

from sphinx.cmd.build import main as sphinx_build
from sphinx.util.inventory import InventoryFile

DOCS = ROOT / "docs"


def build(source: Path, out: Path) -> int:
    """Builds pages with the settings of the documentation as `make docs` does; 0 if there was no warning."""
    return sphinx_build(["-W", "--keep-going", "-q", "-c", str(DOCS), "-d", f"{out}-trees", str(source), str(out)])


def mentioned() -> Iterator[str]:
    """Functions, classes and methods of the package that a page names or imports."""
    for page in PAGES:
        text = (ROOT / page).read_text()
        names = set(re.findall(r"\bcdmoe_plugin(?:\.\w+)+", text))
        names |= {f"cdmoe_plugin.{name}" for name in re.findall(r"\bCondense\w+\.\w+", text)}
        for block in blocks_of(text):
            for node in ast.walk(ast.parse(block.code)) if block.kind == "python" else ():
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cdmoe_plugin":
                    names |= {f"{node.module}.{alias.name}" for alias in node.names}
        yield from (name for name in sorted(names) if not isinstance(pkgutil.resolve_name(name), ModuleType))


@pytest.mark.slow
def test_documentation(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert build(DOCS, tmp_path / "html") == 0, capfd.readouterr().err
    inventory = InventoryFile.loads((tmp_path / "html" / "objects.inv").read_bytes(), uri="")
    documented = {name for kind, objects in inventory.data.items() if kind.startswith("py:") for name in objects}
    assert {f"cdmoe_plugin.{name}" for name in cdmoe_plugin.__all__} <= documented
    assert set(mentioned()) <= documented


@pytest.mark.parametrize(
    "page",
    [
        "[a page](nowhere.md)",
        "[a heading](#nowhere)",
        "[a file](../nowhere.py)",
        "![a picture](nowhere.svg)",
        "```{eval-rst}\n.. autofunction:: cdmoe_plugin.nothing\n```",
    ],
)
def test_a_warning_is_an_error(page: str, tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text("# Page\n")
    assert build(tmp_path / "pages", tmp_path / "good") == 0
    (tmp_path / "pages" / "index.md").write_text(f"# Page\n\n{page}\n")
    assert build(tmp_path / "pages", tmp_path / "bad") == 1
