"""A call after somebody else's import, and what `import cdmoe_plugin` makes of it."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from cdmoe_plugin.after_import import call_after_import


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with a submodule `late`, which fails while the file `broken` is there."""
    folder = tmp_path / "some_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "late.py").write_text("import pathlib\nassert not pathlib.Path(__file__).with_name('broken').exists()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return str(folder)


def test_called_once_after_the_import(package: str) -> None:
    calls: list[bool] = []
    before = list(sys.meta_path)
    call_after_import("some_package.late", lambda: calls.append("some_package.late" in sys.modules))
    import some_package  # type: ignore[import-not-found]

    importlib.util.find_spec("some_package.late")  # a search does not use it up
    assert calls == []
    (Path(package) / "broken").touch()
    with pytest.raises(AssertionError):
        importlib.import_module("some_package.late")  # nor does an import that fails
    assert calls == []
    (Path(package) / "broken").unlink()
    late = importlib.import_module("some_package.late")
    assert calls == [True]
    assert sys.meta_path == before
    assert "pathlib" in inspect.getsource(late)
    importlib.reload(late)
    assert (calls, some_package.late) == ([True], late)
    call_after_import("some_package.late", lambda: calls.append(False))  # it is there already
    assert calls == [True, False]


def test_the_package_imports_nothing_by_itself() -> None:
    program = "import sys, cdmoe_plugin; assert not {'torch', 'transformers'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
