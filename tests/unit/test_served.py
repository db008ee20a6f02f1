"""The table of docs/serve.md that says which engine reads which form is the one that tests recorded.

`python -m tests.unit.test_served` writes it, after tests that run engines were run with `CDMOE_RECORD=1`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import served

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
START, END = "<!-- written by tests/unit/test_served.py -->", "<!-- end -->"


def with_table(text: str) -> str:
    """The page with the recorded table between its markers."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{served.table()}\n\n{END}{after}"


def test_the_table_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(START) == text.count(END) == 1
    assert text == with_table(text), "run `python -m tests.unit.test_served`"


def test_only_recording_runs_keep_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "RESULTS", tmp_path / "served.json")
    monkeypatch.delenv("CDMOE_RECORD", raising=False)
    served.record("engine 1", "dense", "mixtral", 1.0)
    assert not served.RESULTS.exists()
    monkeypatch.setenv("CDMOE_RECORD", "1")
    served.record("engine 1", "dense", "mixtral", 1.26e-7)
    served.record("engine 1", "dense", "deepseek", 3e-7)
    assert json.loads(served.RESULTS.read_text())["engine 1"]["dense"]["mixtral"]["difference"] == 1.3e-7
    assert "| engine 1 | dense | deepseek, mixtral | 3.0e-07 | 2" in served.table()


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
