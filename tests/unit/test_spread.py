"""Expert budgets as far as no model is needed: how they are spread, read, refused, and given on command lines."""

from __future__ import annotations

import itertools
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cdmoe_plugin import CondenseConfig, CondensePlan
from cdmoe_plugin import knapsack as module
from cdmoe_plugin.config import condense_arguments
from cdmoe_plugin.knapsack import allocate, cheapest, estimated_effects
from cdmoe_plugin.search.budget import LayerBudget
from cdmoe_plugin.sizes import read_budget
from tests.helpers.plans import some_plan

RECIPES = Path(__file__).parents[2] / "recipes"
Tables = dict[int, list[float]]


def total(effects: Tables, kept: dict[int, int]) -> float:
    return sum(effects[layer][number] for layer, number in kept.items())


def price(costs: dict[int, int], kept: dict[int, int]) -> int:
    return sum(costs[layer] * number for layer, number in kept.items())


def every_allocation(effects: Tables, costs: dict[int, int], budget: int) -> list[dict[int, int]]:
    ranges = [range(len(values)) for values in effects.values()]
    found = [dict(zip(effects, numbers, strict=True)) for numbers in itertools.product(*ranges)]
    return [kept for kept in found if price(costs, kept) <= budget]


def random_tables(seed: int) -> Tables:
    """Falling on the whole, but not from every expert to the next."""
    rng = random.Random(seed)
    return {
        layer: [rng.uniform(0.5, 2) * 0.8**k + rng.uniform(0, 0.2) for k in range(rng.randint(1, 6))]
        for layer in (5, 1, 3, 8)
    }


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("prices", [(1,), (6,), (1, 2, 3), (4, 6, 14)])
def test_no_allocation_is_better(seed: int, prices: tuple[int, ...]) -> None:
    effects = random_tables(seed)
    costs = {layer: prices[i % len(prices)] for i, layer in enumerate(effects)}
    for budget in (0, 1, 4, 7, 13, 25, 1000):
        kept = allocate(effects, costs, budget)
        allocations = every_allocation(effects, costs, budget)
        assert list(kept) == list(effects)
        assert kept in allocations
        assert total(effects, kept) == pytest.approx(min(total(effects, other) for other in allocations), rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_falling_gains_are_taken_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    effects = {}
    for layer in range(5):
        gains = sorted((rng.random() for _ in range(6)), reverse=True)
        effects[layer] = [10 - sum(gains[:k]) for k in range(7)]
    costs = dict.fromkeys(effects, 3)
    for number in (0, 1, 8, 17, 30, 40):
        kept = dict.fromkeys(effects, 0)
        for _ in range(min(number, 30)):
            open_layers = [i for i in effects if kept[i] < 6]
            kept[max(open_layers, key=lambda i: effects[i][kept[i]] - effects[i][kept[i] + 1])] += 1
        assert allocate(effects, costs, 3 * number + 2) == kept


def test_experts_that_help_only_together() -> None:
    effects = {0: [1.0, 1.1, 0.2], 1: [1.0, 0.7, 0.65]}
    assert allocate(effects, {0: 1, 1: 1}, 1) == {0: 0, 1: 1}
    assert allocate(effects, {0: 1, 1: 1}, 2) == {0: 2, 1: 0}
    assert allocate(effects, {0: 1, 1: 1}, 3) == {0: 2, 1: 1}
    assert allocate({0: [1.0, 1.0, 2.0], 1: [0.0, 0.5]}, {0: 1, 1: 1}, 9) == {0: 0, 1: 0}  # no use, or harm


@pytest.mark.parametrize("seed", range(5))
def test_costs_without_a_common_unit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_UNITS", 500)
    effects, costs = random_tables(seed), {5: 1009, 1: 2003, 3: 997, 8: 1511}
    for budget in (900, 5000, 12000):
        kept = allocate(effects, costs, budget)
        assert price(costs, kept) <= budget
        rounded = [k for k in every_allocation(effects, costs, budget) if price(costs, k) <= budget * 0.95]
        assert total(effects, kept) <= min(total(effects, other) for other in rounded)


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_of_options_is_better(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    effects = {layer: [rng.random() for _ in range(rng.randint(1, 5))] for layer in rng.sample(range(9), 4)}
    costs = {layer: [rng.randint(0, 40) * (1 + seed % 3) + 7 for _ in own] for layer, own in effects.items()}
    choices = [
        dict(zip(effects, c, strict=True)) for c in itertools.product(*(range(len(v)) for v in effects.values()))
    ]
    price = lambda chosen: sum(costs[layer][number] for layer, number in chosen.items())  # noqa: E731
    least = min(map(price, choices))
    for budget in (least, least + 5, least + 31, least + 80, 10**6):
        found = cheapest(effects, costs, budget)
        assert price(found) <= budget
        best = min(total(effects, other) for other in choices if price(other) <= budget)
        assert total(effects, found) == pytest.approx(best, rel=1e-12)
        with monkeypatch.context() as patch:  # rounded up, and what is left over spent
            patch.setattr(module, "_MOST_UNITS", 7)
            found = cheapest(effects, costs, budget)
        assert price(found) <= budget
        better = [o for o in choices if price(o) <= budget and sum(o[i] != found[i] for i in o) == 1]
        assert total(effects, found) <= min(total(effects, other) for other in better) if better else True
    with pytest.raises(ValueError, match="the cheapest options cost"):
        cheapest(effects, costs, least - 1)


def test_effects_on_the_model_are_estimated() -> None:
    own = {0: [4.0, 2.0, 1.0], 1: [0.3, 0.1, 0.0], 2: [5.0, 4.0, 0.0]}
    effects = estimated_effects({0: 0.5, 1: 0.2, 2: 0.0}, own, {0: 1, 1: 0, 2: 2})
    assert effects[0] == pytest.approx([1.0, 0.5, 0.25])
    assert effects[1] == pytest.approx([0.2, 0.2 / 3, 0.0])
    assert effects[2] == pytest.approx([5 * 11 / 24, 4 * 11 / 24, 0.0])  # 1/4 and 2/3 on average
    assert estimated_effects({2: 0.0}, {2: own[2]}, {2: 2}) == {2: own[2]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, (0, "experts")),
        (54, (54, "experts")),
        ("300M params", (300_000_000, "parameters")),
        ("1.5b parameters", (1_500_000_000, "parameters")),
        (" 20 K params ", (20_000, "parameters")),
        ("7000 params", (7_000, "parameters")),
        ("2GB", (2_000_000_000, "bytes")),
        ("500MiB", (500 * 2**20, "bytes")),
        ("0.5 GiB", (2**29, "bytes")),
        ("100B", (100, "bytes")),
    ],
)
def test_budgets(text: Any, expected: tuple[int, str]) -> None:
    assert read_budget(text) == expected
    config = CondenseConfig(num_experts="auto", expert_budget=text)
    assert CondenseConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "wrong", [-1, True, 2.0, "54", "", "lots", "2Gb", "3M", "-2GB", "1iB", "300 M", "2GB params", []]
)
def test_unreadable_budgets(wrong: Any) -> None:
    with pytest.raises(ValueError, match="`expert_budget` should be a number of experts, or text"):
        CondenseConfig(num_experts="auto", expert_budget=wrong)


def test_auto_and_budget_need_each_other() -> None:
    with pytest.raises(ValueError, match="`num_experts='auto'` needs an `expert_budget`"):
        CondenseConfig(num_experts="auto")
    with pytest.raises(ValueError, match=r"`expert_budget` is 54.*`num_experts='auto'`.*`num_experts` is 6"):
        CondenseConfig(expert_budget=54)
    with pytest.raises(ValueError, match="`num_experts` should be a whole number"):
        CondenseConfig(num_experts="automatic")  # type: ignore[arg-type]


def test_uniform_depth_and_even() -> None:
    sizes = {1: 8, 2: 8, 3: 4}
    budget = LayerBudget(10, "experts", dict.fromkeys(sizes, 1), sizes, 2)
    assert (budget.uniform, [budget.depth(layer) for layer in sizes]) == (5, [8, 8, 4])
    assert budget.even([3, 1]) == {3: 4, 1: 6}
    small = LayerBudget(3, "experts", dict.fromkeys(sizes, 1), sizes, 2)
    assert (small.uniform, [small.depth(layer) for layer in sizes]) == (1, [3, 3, 3])
    assert small.even([1, 2]) == {1: 2, 2: 1}
    # Any two of the three must fit; a layer alone may not even pay for what the average would let it.
    dear = LayerBudget(100, "bytes", {1: 10, 2: 20, 3: 30}, sizes, 2)
    assert (dear.uniform, [dear.depth(layer) for layer in sizes]) == (2, [6, 5, 3])
    LayerBudget(16, "experts", dict.fromkeys(sizes, 1), sizes, 2).check()
    with pytest.raises(ValueError, match="`expert_budget` is 17 experts, but all routed experts of 2 layers are 16"):
        LayerBudget(17, "experts", dict.fromkeys(sizes, 1), sizes, 2).check()


@pytest.fixture(scope="module", params=["condense", "recover_stages"])
def parser(request: pytest.FixtureRequest) -> Any:
    script = import_module(f"cdmoe_plugin.scripts.{request.param}")
    prefix = "" if request.param == "condense" else "condense_"

    def parse(text: str, *arguments: str) -> dict[str, Any]:
        """The fields that were set, by a YAML file of these lines and by the command line."""
        config.write_text("".join(f"{prefix}{line}\n" for line in text.splitlines()) + "model_name_or_path: x\n")
        given = [a.replace("--", f"--{prefix}") if a.startswith("--") else a for a in arguments]
        both = ["--config", str(config), *given, *([] if not prefix else ["--use_cpu", "--output_dir", "x"])]
        search = script.make_parser().parse_args_and_config(args=both)[-1]
        return {name.removeprefix(prefix): value for name, value in vars(search).items() if value is not None}

    config = request.getfixturevalue("tmp_path_factory").mktemp("yaml") / "config.yaml"
    return parse


def test_command_lines_and_yaml(parser: Any) -> None:
    assert parser("", "--num_experts", "6") == {"num_experts": 6}
    assert parser("num_experts: 6") == {"num_experts": 6}
    assert parser("num_experts: '6'", "--seed", "3") == {"num_experts": 6, "seed": 3}
    assert parser("num_experts: 6", "--num_experts", "0") == {"num_experts": 0}
    assert parser("", "--num_experts", "-1") == {"num_experts": -1}  # CondenseConfig refuses it
    auto = {"num_experts": "auto", "expert_budget": 54}
    assert parser("", "--num_experts", "auto", "--expert_budget", "54") == auto
    assert parser("num_experts: auto\nexpert_budget: 54") == auto
    texts = {"num_experts": "auto", "expert_budget": "300M params"}
    assert parser("num_experts: auto\nexpert_budget: 300M params") == texts
    assert parser("expert_budget: 2GB", "--num_experts", "auto", "--expert_budget", "300M params") == texts
    assert CondenseConfig(**texts).expert_budget == "300M params"
    assert parser("", "--target_size", "0.64") == parser("target_size: 0.64") == {"target_size": 0.64}
    assert parser("", "--target_size", "24GB") == parser("target_size: 24GB") == {"target_size": "24GB"}
    assert condense_arguments()(num_experts="7", expert_budget="x").expert_budget == "x"


def test_cutting_a_plan_of_different_numbers() -> None:
    config = CondenseConfig(num_layers=3, num_experts="auto", expert_budget="2GB").to_dict()
    rows = [
        {"layer": layer, "experts": list(range(k)), "gates": [1.0] * k, "score": 0.1 * layer + 0.1}
        for layer, k in ((2, 1), (0, 3), (1, 0))
    ]
    plan = CondensePlan.from_dict({"version": 1, "layers": rows, "config": config, "layer_divergences": {"2": 0.1}})
    assert plan.truncate() == plan
    small = plan.truncate(num_experts=2)
    assert [len(row.experts) for row in small.layers] == [1, 2, 0]
    assert [row.score for row in small.layers] == [plan.layers[0].score, None, None]  # of all layers up to there
    assert small.layer_divergences is None
    assert small.config == {**config, "num_experts": 2, "expert_budget": None}
    assert CondenseConfig.from_dict(small.config or {}).num_experts == 2
    assert plan.truncate(num_experts=3).layers == plan.layers
    fewer = plan.truncate(num_layers=2)
    assert fewer.config == {**config, "num_layers": 2, "expert_budget": 4}
    assert [row.score for row in fewer.layers] == [row.score for row in plan.layers[:2]]
    with pytest.raises(ValueError, match="between 0 and the plan's 3, but is 4"):
        plan.truncate(num_experts=4)
    assert "expert_budget" not in (some_plan([1, 2]).truncate(num_experts=1).config or {})
