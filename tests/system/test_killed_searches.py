"""A search that is killed again and again, by a real signal in another process, gives the plan of the unbroken run."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from cdmoe_plugin import CondenseConfig, CondensePlan, search_plan
from tests.helpers.killing import KILLED, dying_before, run, run_and_kill
from tests.helpers.models import build
from tests.helpers.tiny_models import random_ids

IDS = random_ids(6, 20)


class Search:
    """A search with its state and its plan on disk, as a process of its own runs it."""

    def __init__(self, folder: Path) -> None:
        self.model = build("qwen2_moe", num_layers=6)
        self.config = CondenseConfig(num_layers=4, num_experts=4, batch_size=2)
        self.state, self.plan = folder / "state", folder / "plan.json"
        self.unbroken = search_plan(self.model, self.config, calibration=IDS)
        start = time.monotonic()  # the first search takes longer
        search_plan(self.model, self.config, calibration=IDS)
        self.seconds = time.monotonic() - start

    def __call__(self) -> None:
        search_plan(self.model, self.config, calibration=IDS, state_dir=self.state).save(self.plan)

    def found_the_same(self) -> bool:
        """Whether the plan on disk is that of the unbroken run; the next search begins anew."""
        plan = CondensePlan.load(self.plan)
        self.plan.unlink()
        shutil.rmtree(self.state)
        return plan == self.unbroken


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return Search(tmp_path)


def test_killed_at_random_moments(search: Search) -> None:
    rng, kills = random.Random(0), {signal.SIGKILL: 0, signal.SIGINT: 0}
    resumed = 0
    while min(kills.values()) < 10:
        how = rng.choice([*kills])
        began = search.state.exists()
        status = run_and_kill(search, after=rng.uniform(0, search.seconds), how=how)
        if status == 0:
            assert search.found_the_same()
            resumed += began
        else:
            assert status == (KILLED if how == signal.SIGKILL else 1)  # 1: KeyboardInterrupt
            kills[how] += 1
    assert run(search) == 0
    assert search.found_the_same()
    assert resumed > 0


def test_killed_around_every_write(search: Search) -> None:
    """Right before a file gets its name, or right after, which is before the next one is opened."""
    moments = frozenset({"os.rename", "os.remove"})
    kills = 0
    # Two whole writes, and a part of another: the last run writes the plan beside the state, and where it was asked to.
    while run(dying_before(4 + kills % 2, search, moments)) == KILLED:
        kills += 1
    assert kills > 3
    assert search.found_the_same()
