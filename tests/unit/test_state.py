"""A search that is interrupted goes on where it was, and never on another search's results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cdmoe_plugin import CondenseConfig, search_plan
from cdmoe_plugin.search.state import FILE, SearchState
from tests.helpers.interrupting import Interrupted, interrupting
from tests.helpers.tiny_models import random_ids, tiny_model

CONFIG = CondenseConfig(num_layers=2, num_experts=2)
IDS = random_ids(5)


# Three layers of experts, then a round of three candidates (with the work that it took) and one of two.
@pytest.mark.parametrize(("after", "number"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 7)])
def test_resumes_to_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, number: int) -> None:
    model = tiny_model("qwen2_moe")
    unbroken = search_plan(model, CONFIG, calibration=IDS)
    with monkeypatch.context() as patch:
        patch.setattr(SearchState, "update", interrupting(after))
        with pytest.raises(Interrupted):
            search_plan(model, CONFIG, calibration=IDS, state_dir=tmp_path)
    done = json.loads((tmp_path / FILE).read_text())["results"] if after else {}
    assert len(done) == number
    with monkeypatch.context() as patch:
        patch.setattr(SearchState, "update", interrupting(5 - after))  # nothing is done again
        assert search_plan(model, CONFIG, calibration=IDS, state_dir=tmp_path) == unbroken


def test_goes_on_from_a_state_of_version_0_1(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    plan = search_plan(model, CONFIG, calibration=IDS, state_dir=tmp_path)
    state = SearchState(tmp_path, json.loads((tmp_path / FILE).read_text())["fingerprint"], dict.fromkeys((1, 2, 3), 8))
    old = {name: value for name, value in state["experts 2"].items() if name != "tokens"}  # it counted no tokens
    state["experts 2"] = old
    again = search_plan(model, CONFIG, calibration=IDS, state_dir=tmp_path)
    assert again.layers == [replace(row, tokens=None) if row.layer == 2 else row for row in plan.layers]
    assert any(row.layer == 2 for row in plan.layers)


@pytest.mark.parametrize("other", ["model", "config", "calibration data"])
def test_refuses_the_state_of_another_search(tmp_path: Path, other: str) -> None:
    model = tiny_model("qwen2_moe")
    search_plan(model, CONFIG, calibration=IDS, state_dir=tmp_path)
    before = (tmp_path / FILE).read_bytes()
    model = tiny_model("qwen2_moe", seed=1) if other == "model" else model
    config = CondenseConfig(num_layers=1, num_experts=2) if other == "config" else CONFIG
    ids = [*IDS[:-1], IDS[-1][:-1]] if other == "calibration data" else IDS
    with pytest.raises(ValueError, match=f"its {other} differ"):
        search_plan(model, config, calibration=ids, state_dir=tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_memory_for_the_cache_may_change(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    plan = search_plan(model, CONFIG, calibration=IDS, state_dir=tmp_path)
    small = CondenseConfig(num_layers=2, num_experts=2, cache_memory="1KB")
    assert search_plan(model, small, calibration=IDS, state_dir=tmp_path).layers == plan.layers


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1, "fingerprint": 3, "results": {}}', "\x80"])
def test_refuses_what_is_no_state(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match="not a valid search state"):
        SearchState(tmp_path, {})
