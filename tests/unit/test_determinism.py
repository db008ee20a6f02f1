"""The same seed gives the same plan, on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cdmoe_plugin import CondenseConfig, CondensePlan, search_plan
from tests.helpers.naive import close
from tests.helpers.tiny_models import random_ids, tiny_model

IDS = random_ids(6, 48)
CONFIGS = {
    "greedy": CondenseConfig(num_layers=3, num_experts=4),
    "ranked": CondenseConfig(num_layers=3, num_experts=4, expert_selection="reap", layer_selection="local"),
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def search(config: CondenseConfig, number: int) -> CondensePlan:
    torch.set_num_threads(number)
    return search_plan(tiny_model("deepseek_v3", hidden=64, num_experts=16), config, calibration=IDS)


@pytest.mark.parametrize("name", CONFIGS)
def test_threads(name: str) -> None:
    one, again, two = (search(CONFIGS[name], number) for number in (1, 1, 2))
    assert again == one
    for mine, its in zip(one.layers, two.layers, strict=True):
        assert (mine.layer, mine.experts) == (its.layer, its.experts)
        assert mine.gates == pytest.approx(its.gates, rel=1e-6)
        assert mine.score == close(its.score)
