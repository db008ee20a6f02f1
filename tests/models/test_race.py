"""The race of candidate layers: the layers of a complete search, with less work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cdmoe_plugin import CondenseConfig, CondensePlan, search_plan
from cdmoe_plugin.blocks import find_sparse_blocks
from cdmoe_plugin.processes import Processes
from cdmoe_plugin.search.layers.race import Race, draw_stages, in_the_race, student_t
from cdmoe_plugin.search.layers.variants import LayerSearchData, layer_runs
from cdmoe_plugin.search.state import SearchState
from tests.helpers.interrupting import Interrupted, interrupting
from tests.helpers.naive import close
from tests.helpers.tiny_models import tiny_model

# Of different lengths, in five batches.
GENERATOR = torch.Generator().manual_seed(0)
LENGTHS = torch.randint(4, 24, (36,), generator=GENERATOR).tolist()
SEQUENCES = [torch.randint(1, 60, (length,), generator=GENERATOR).tolist() for length in LENGTHS]
FULL = CondenseConfig(num_layers=5, num_experts=2, layer_search="full", expert_selection="frequency")
SIZES = [8] * 8


def deep_model(trained: bool) -> PreTrainedModel:
    """A model of eight sparse layers, with random weights of different sizes, or trained a little."""
    model = tiny_model("qwen2_moe", num_layers=8, seed=1)
    for block in find_sparse_blocks(model):
        block.module.experts.down_proj.data *= 0.5 + 1.5 * ((5 * block.layer) % 8) / 8
    if trained:
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
        for step in range(30):
            starts = (torch.arange(8) * 5 + step)[:, None] % 50
            ids = (starts + torch.arange(16)) % 50 + 1
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


models = cache(deep_model)


def same(one: CondensePlan, other: CondensePlan) -> None:
    """The same layers and experts, and the same divergences up to the last bits of other batches' products."""
    assert [(row.layer, row.experts) for row in one.layers] == [(row.layer, row.experts) for row in other.layers]
    assert [row.score for row in one.layers] == close([row.score for row in other.layers])
    assert one.layer_divergences == close(other.layer_divergences)


@pytest.mark.parametrize(
    ("trained", "fields"),
    [
        (False, {}),
        (True, {}),
        (True, {"metric": "ppl"}),
        (False, {"metric": "kl", "compare": "logits", "batch_size": 1, "num_layers": 2}),
        (False, {"form": "trim_block", "seed": 3}),
        (False, {"exportable": "stock", "batch_size": 40, "cache_memory": "20KB"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_the_layers_are_those_of_a_complete_search(trained: bool, fields: dict[str, Any]) -> None:
    config = replace(FULL, **fields)
    full = search_plan(models(trained), config, calibration=SEQUENCES)
    race = search_plan(models(trained), replace(config, layer_search="race"), calibration=SEQUENCES)
    same(race, full)
    assert race.config is not None
    assert race.config["layer_search"] == "race"
    assert race.token_layers is not None
    assert full.token_layers is not None
    # With another metric, so few sequences may decide nothing.
    assert race.token_layers <= full.token_layers
    assert fields or race.token_layers < full.token_layers


def test_the_work_is_counted() -> None:
    tokens, candidates = sum(LENGTHS), [block.layer for block in find_sparse_blocks(models(False))]
    full = search_plan(models(False), FULL, calibration=SEQUENCES)
    chosen = [row.layer for row in full.layers]
    rounds = [[{*chosen[:n], layer} for layer in candidates if layer not in chosen[:n]] for n in range(5)]
    expected = 8  # the unmodified model
    for variants in rounds:
        for layer in range(8):
            expected += len({frozenset(i for i in variant if i <= layer) for variant in variants})
    assert full.token_layers == expected * tokens
    race = search_plan(models(False), replace(FULL, layer_search="race"), calibration=SEQUENCES)
    complete = 8 + layer_runs([frozenset(variant) for variant in rounds[0]], 8)
    assert race.token_layers is not None
    # In later rounds, the winner runs on all sequences.
    assert (complete + 4 * 8) * tokens <= race.token_layers < full.token_layers
    assert layer_runs([frozenset({1}), frozenset({3})], 4) == 1 + 2 + 2 + 2
    assert CondensePlan.from_dict(full.to_dict()).token_layers == full.token_layers
    assert full == replace(full, token_layers=None)
    assert "token_layers" not in replace(full, token_layers=None).to_dict()


def test_a_search_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(FULL, layer_search="race")
    expected = search_plan(models(False), config, calibration=SEQUENCES)
    for writes in (1, 2, 4):
        check_resumed(config, expected, writes, tmp_path / str(writes), monkeypatch)


def check_resumed(
    config: CondenseConfig, expected: CondensePlan, writes: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SearchState, "update", interrupting(writes))
        with pytest.raises(Interrupted):
            search_plan(models(False), config, calibration=SEQUENCES, state_dir=folder)
    for _ in range(2):  # and once more from a finished state
        plan = search_plan(models(False), config, calibration=SEQUENCES, state_dir=folder)
        assert plan.layers == expected.layers


class Known(Race):
    """A race whose divergences `[V, S]` are known."""

    def __init__(self, values: Tensor, seed: int) -> None:
        self.values = dict(zip((frozenset({i}) for i in range(len(values))), values, strict=True))
        stream: Any = SimpleNamespace(split=lambda parts: SimpleNamespace(parts=parts, batches=parts))
        comparison: Any = SimpleNamespace(on=lambda _stream: None)
        unused: Any = None
        data = LayerSearchData(stream, [], unused, comparison, {}, 0, [], unused, Processes(None, len(SIZES)))
        super().__init__(replace(data, races=True, seed=seed), SIZES)

    def _shares(
        self, variants: Sequence[frozenset[int]], batches: Sequence[int], _tick: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        stream: Any = self.data.stream
        for batch, rows in (stream.parts[i] for i in batches):
            places = [batch * SIZES[0] + row for row in rows]
            shares = torch.stack([self.values[variant][places] for variant in variants])
            yield shares, torch.tensor([float(shares.numel())])


def test_known_divergences() -> None:
    """Of 600 races among 27 candidates, none is decided wrongly, at less than half of the work."""
    generator = torch.Generator().manual_seed(0)
    wrong, work = 0, 0.0
    for number in range(600):
        sizes = torch.rand(27, 1, dtype=torch.float64, generator=generator).mul(1.5).exp()
        common = torch.randn(1, 64, dtype=torch.float64, generator=generator).mul(0.4).exp()
        own = torch.randn(27, 64, dtype=torch.float64, generator=generator).mul(0.15).exp()
        values = sizes * common * own
        race = Known(values, seed=number)
        best, found = race.least({i: frozenset({i}) for i in range(27)})
        wrong += best != int(values.sum(1).argmin())
        work += race.data.known["token-layers"] / values.numel()
        assert found[best] == pytest.approx(float(values[best].sum()))
    assert wrong == 0
    assert work / 600 < 0.5


def test_equals_stay() -> None:
    values = torch.rand(1, 12, dtype=torch.float64).add(1).repeat(3, 1)
    values[1] *= 1 + 3e-7
    values[2] += 1
    assert in_the_race(values, 64) == [0, 1]
    assert in_the_race(values[:, :2], 64) == [0, 1]


@pytest.mark.parametrize(
    ("freedom", "chance", "value"), [(1, 0.05, 6.3138), (4, 0.01, 3.7469), (7, 0.001, 4.7853), (30, 0.0005, 3.6460)]
)
def test_student_t_as_in_tables(freedom: int, chance: float, value: float) -> None:
    assert student_t(freedom, chance) == pytest.approx(value, abs=1e-4)


def test_stages_hold_every_sequence_once() -> None:
    stages = draw_stages([8, 8, 8, 8, 3], 0)
    assert [len(stage) for stage in stages] == [8, 8, 19]
    assert [len(stage) for stage in draw_stages([8] * 12 + [4], 0)] == [8, 8, 16, 68]
    rows = [(batch, row) for batch, size in enumerate([8, 8, 8, 8, 3]) for row in range(size)]
    assert sorted(pair for stage in stages for pair in stage) == rows
    assert draw_stages([8, 8, 8, 8, 3], 0) == stages != draw_stages([8, 8, 8, 8, 3], 1)
