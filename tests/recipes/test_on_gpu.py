"""recipes/benchmarks/on_gpu.py on the CPU, so that no time on a GPU is lost to a mistake in it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture(scope="module")
def on_gpu() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("on_gpu")


def test_every_part(on_gpu: Any, tmp_path: Path) -> None:
    output = tmp_path / "figures.jsonl"
    on_gpu.main(["--device=cpu", "--size=tiny", "--one_process", f"--output={output}"])
    figures = [json.loads(line) for line in output.read_text().splitlines()]
    assert not [figure for figure in figures if "error" in figure]
    assert list(dict.fromkeys(figure["part"] for figure in figures)) == list(on_gpu.PARTS)
    named = {figure["name"]: figure for figure in figures}
    assert named["search of a small model"]["same_plan_as_cpu"]
    assert named["refit of a small model"]["reopened_difference"] < 1e-5
    assert named["race and full search"]["same_layers"]
    assert named["decoding, batch 2, E(2+2) L3"]["ratio"] > 0
    assert all(figure["seconds"] > 0 for figure in figures if "seconds" in figure)
    rows = on_gpu.table(output).splitlines()
    assert rows[0].count("torch") == 1
    assert len([row for row in rows if row.startswith("|")]) == len(figures) - len(on_gpu.PARTS) + 2


def test_a_part_that_takes_too_long_is_cut_off(on_gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.jsonl"
    on_gpu.main(["--device=cpu", "--size=tiny", "--minutes=0.0005", f"--output={output}"])
    assert [json.loads(line)["name"] for line in output.read_text().splitlines()] == ["cut off"]
    assert "on_gpu.py --device=cpu" in capsys.readouterr().out


def test_an_error_leaves_the_other_parts(on_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_setting: Any) -> Any:
        yield {"name": "first", "seconds": 1.0}
        raise RuntimeError("out of memory")

    parts = {"one": (broken, 1.0), "two": (lambda _setting: iter([{"name": "second"}]), 1.0)}
    monkeypatch.setattr(on_gpu, "PARTS", parts)
    output = tmp_path / "figures.jsonl"
    on_gpu.main(["--device=cpu", "--size=tiny", "--one_process", f"--output={output}"])
    names = [json.loads(line)["name"] for line in output.read_text().splitlines()]
    assert names == ["where", "first", "failed", "where", "second"]
    with pytest.raises(SystemExit):
        on_gpu.main(["--parts=check,nothing"])
