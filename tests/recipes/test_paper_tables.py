"""recipes/benchmarks/paper_tables.py: what is measured, that nothing is measured twice, and the verdicts."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cdmoe_plugin import CondensePlan, apply_plan
from tests.helpers.lm_eval_cases import Case, make_case
from tests.helpers.models import build
from tests.helpers.recovery import write_data

pytest.importorskip("lm_eval")
BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
MODULES = ("tables", "bench", "models", "recovery", "results", "drawing", "claims")
PARTS = "table1,figure1,figure2,figure3,figure4,figure5,refit"
RECOVERY = """
lm_dataset: {folder}/lm.jsonl
sft_dataset: {folder}/sft.json
learning_rate: 1.0e-2
max_steps: 2
max_length: 32
use_cpu: true
bf16: false
save_strategy: "no"
report_to: none
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def paper() -> Any:
    """The script and its modules, which are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield SimpleNamespace(**{name: importlib.import_module(f"paper_{name}") for name in MODULES})


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    write_data(folder)
    build("deepseek").save_pretrained(folder / "second")
    case = make_case(folder)
    AutoTokenizer.from_pretrained(case.base).save_pretrained(folder / "second")
    (folder / "recovery.yaml").write_text(RECOVERY.format(folder=folder))
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "mine-L3").symlink_to(case.condensed)
    (checkpoints / "sparse").symlink_to(case.base)
    return case


@pytest.fixture(scope="module")
def arguments(case: Case) -> list[str]:
    texts = case.base.parent / "lm.jsonl"
    given = {
        "model_name_or_path": case.base,
        "tasks": "tiny_choice",
        "include_path": case.tasks,
        "held_out": texts,
        "calibration": texts,
        "layers": "1,2",
        "num_experts": 2,
        "num_samples": 16,
        "max_length": 16,
        "held_out_rows": 4,
        "speed_tokens": 32,
        "seeds": "0",
        "only": PARTS,
        "output_dir": case.base.parent / "paper",
        "recovery_config": case.base.parent / "recovery.yaml",
        "recovery_dir": case.base.parent / "checkpoints",
        "second_model_name_or_path": case.base.parent / "second",
    }
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.fixture(scope="module")
def folder(paper: Any, arguments: list[str], case: Case) -> Path:
    """The output folder of a whole run."""
    paper.tables.main(arguments)
    return case.base.parent / "paper"


def forbid(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *names: str) -> None:
    def called(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("computed again")

    for name in names:
        monkeypatch.setattr(module, name, called)


def test_everything_is_drawn(folder: Path) -> None:
    text = (folder / "tables.md").read_text()
    titles = ("Table 1", "Figure 5. Calibration data: held-out loss", "refit: accuracy", "Claims")
    for title in (*titles, "Figure 3. Recovered models: accuracy", "Figure 4. Another model, second "):
        assert title in text
    assert {path.name for path in folder.glob("*.png")} == {f"figure{i}.png" for i in (1, 2, 3, 4, 5)}
    assert "left out" not in text


def test_a_number_is_that_of_an_independent_measurement(paper: Any, folder: Path, case: Case) -> None:
    results = paper.results.Results(folder / "results.csv")
    model = AutoModelForCausalLM.from_pretrained(case.base)
    before = sum(p.numel() for p in model.parameters())
    plan = CondensePlan.load(folder / "plans" / "condense-greedy-greedy-js-texts-seed0.json")
    model = apply_plan(model, plan.truncate(num_layers=2, num_experts=2)).eval()
    opener = paper.models.Opener(str(case.base))
    texts = paper.tables.read_texts(case.base.parent / "lm.jsonl")
    rows = paper.models.rows_of_tokens(opener.tokenizer, texts, 16, 4)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    expected = sum(losses) / len(losses)
    for part, method in (("table1", "CD-MoE E(shared+2)"), ("figure5", "texts"), ("refit", "none")):
        assert paper.claims.curve(results, part, method, "loss")[2][0] == pytest.approx(expected, abs=1e-4)
    same = {row.metric: row.value for row in results.of("figure3") if row.cell.method == "sparse"}
    assert same["loss"] == results.known(paper.results.Setting())["loss"]
    ratio = sum(p.numel() for p in model.parameters()) / before
    memory = paper.claims.curve(results, "table1", "CD-MoE E(shared+2)", "memory")[2][0]
    assert memory == pytest.approx(ratio, abs=0.01)
    line = next(
        line for line in (folder / "tables.md").read_text().splitlines() if "| CD-MoE E(shared+2) |      2" in line
    )
    assert f"{memory:.1%}" in line
    assert f"{paper.claims.curve(results, 'table1', 'CD-MoE E(shared+2)', 'loss')[2][0]:.4f}" in line


def test_recovered_models_are_the_recipes(paper: Any, folder: Path, case: Case) -> None:
    results = paper.results.Results(folder / "results.csv")
    assert {row.cell.setting.layers for row in results.of("figure3") if row.cell.method == "mine"} == {3}
    rows = paper.models.rows_of_tokens(
        AutoTokenizer.from_pretrained(case.base), paper.tables.read_texts(case.base.parent / "lm.jsonl"), 16, 4
    )
    losses = {}
    for method, place in (("LM+SFT E(shared+0)", "lm-sft-E0-L2"), ("SFT E(shared+2)", "sft-E2-L1")):
        model = AutoModelForCausalLM.from_pretrained(folder / "recovered" / place)
        losses[method] = paper.models.held_out_loss(model, rows, 4)
        layers, experts = len(model.condense_plan.layers), len(model.condense_plan.layers[0].experts)
        assert place.endswith(f"-E{experts}-L{layers}")
        assert paper.claims.curve(results, "figure3", method, "loss")[layers][0] == pytest.approx(losses[method])
        before = method.replace("LM+SFT", "CD-MoE").replace("SFT", "CD-MoE")
        assert paper.claims.curve(results, "table1", before, "loss")[layers][0] > losses[method]
        for cost in ("memory", "speedup"):
            costs = [
                paper.claims.curve(results, part, m, cost) for part, m in (("figure3", method), ("table1", before))
            ]
            assert costs[0][layers] == costs[1][layers]
    text = (folder / "tables.md").read_text()
    for claim in ("LM+SFT E(shared+0) beats CD-MoE E(shared+0)", "beats SFT E(shared+2)", "keeps 98% of the accuracy"):
        assert claim in text


def test_the_second_model_is_another(paper: Any, folder: Path, case: Case) -> None:
    first, second = (paper.results.Results(path / "results.csv") for path in (folder, folder / "second"))
    assert second.model.startswith("second ")
    assert {cell.part for cell, _ in second.rows} == {"sparse", "table1"}
    model = AutoModelForCausalLM.from_pretrained(case.base.parent / "second")
    plan = CondensePlan.load(folder / "second" / "plans" / "condense-greedy-greedy-js-texts-seed0.json")
    condensed = sum(p.numel() for p in apply_plan(model, plan.truncate(1, 2)).parameters())
    ratios = [paper.claims.curve(each, "table1", "CD-MoE E(shared+2)", "memory")[1][0] for each in (first, second)]
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(case.base.parent / "second").parameters())
    assert ratios[1] == pytest.approx(condensed / whole, abs=0.01)
    assert ratios[0] != ratios[1]


def test_the_same_model_is_measured_once(
    paper: Any, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def counted(*args: Any) -> float:
        measured.append(args)
        return paper.models.held_out_loss(*args)

    monkeypatch.setattr(paper.bench, "held_out_loss", counted)
    paper.tables.main([*arguments, "--only=table3,figure5", "--layers=3", f"--output_dir={tmp_path}"])
    # All sparse layers, with the same experts whatever their order: but others, if other texts choose them.
    assert len(measured) == 3
    results = paper.results.Results(tmp_path / "results.csv")
    (same,) = {row.value for row in results.of("table3") if row.metric == "loss"}
    assert {row.cell.method: row.value == same for row in results.of("figure5") if row.metric == "loss"} == {
        "texts": True,
        "questions": False,
    }


def test_the_quickstarts_models_and_recovery(paper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(paper.tables.EXAMPLES))
    tiny_moe = importlib.import_module("tiny_moe")
    texts = [" ".join(f"w{i * j % 997}" for j in range(200)) for i in range(1, 60)]
    monkeypatch.setattr(tiny_moe, "corpus", lambda: (texts[:40], texts[40:]))
    monkeypatch.setitem(tiny_moe.TRAINING, "steps", 1)
    folders = {"output_dir": "out", "quickstart_dir": "quickstart", "cache_dir": "cache"}
    given = [f"--{name}={tmp_path / folder}" for name, folder in folders.items()]
    args = paper.tables.parse_arguments(given)
    calibration, held_out, recovery = paper.tables.complete(args)
    assert (calibration, held_out) == (texts[:40], texts[40:])
    second = paper.tables.second_arguments(args)
    types = [AutoConfig.from_pretrained(each.model_name_or_path).model_type for each in (args, second)]
    assert types == ["deepseek", "qwen2_moe"]
    recovery.check(max(args.layers), args.num_experts)
    log = (tmp_path / "out" / "recovered" / "check.log").read_text()
    assert "lm: " in log
    assert "up to 20 steps" in log
    pairs = [json.loads(line) for line in recovery.data["sft_dataset"].read_text().splitlines()]
    assert all(any(pair["prompt"] + pair["completion"] in text for text in texts[:40]) for pair in pairs[:50])
    forbid(monkeypatch, tiny_moe, "train_or_load")
    paper.tables.complete(paper.tables.parse_arguments(given))


def test_a_second_run_computes_nothing(
    paper: Any, folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "results.csv").read_bytes()
    forbid(monkeypatch, paper.bench, "search_plan", "held_out_loss", "costs")
    forbid(monkeypatch, paper.models, "condense_pretrained", "AutoModelForCausalLM")
    forbid(monkeypatch, paper.recovery.Recovery, "run")
    paper.tables.main(arguments)
    assert (folder / "results.csv").read_bytes() == before


def test_an_interrupted_run_goes_on(
    paper: Any, folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "results.csv"
    lines = path.read_text().splitlines(keepends=True)
    # Of everything that is measured once, the last; and what was copied from it.
    lost = [line for line in lines if ",distill,loss," in line][-1]
    path.write_text("".join(line for line in lines if line != lost))
    forbid(monkeypatch, paper.bench, "search_plan", "costs")
    monkeypatch.setattr(paper.models.Tasks, "accuracy", None)
    paper.tables.main(arguments)
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


def test_drawing_needs_the_csv_alone(paper: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (Path("results.csv"), Path("second") / "results.csv"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((folder / path).read_bytes())
    monkeypatch.setattr(paper.tables, "Bench", None)
    paper.tables.main(["--draw_only", f"--output_dir={tmp_path}", f"--only={PARTS}"])
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in folder.glob("*.png")}
    text = (tmp_path / "tables.md").read_text()
    assert text == (folder / "tables.md").read_text()
    # The second model's rows may lie elsewhere, or be missing.
    moved = (tmp_path / "second").rename(tmp_path / "elsewhere")
    again = ["--draw_only", f"--output_dir={tmp_path}", "--only=figure4"]
    paper.tables.main(again)
    assert "Figure 4 is left out" in (tmp_path / "tables.md").read_text()
    paper.tables.main([*again, f"--second_dir={moved}"])
    assert "- figure4.png: " in (tmp_path / "tables.md").read_text()


@pytest.mark.parametrize(
    ("old", "new"), [("part,method", "part,name"), ("base ", "other "), ("greedy,js", "greedy,js,")]
)
def test_another_csv_is_refused(
    paper: Any, folder: Path, arguments: list[str], tmp_path: Path, old: str, new: str
) -> None:
    text = (folder / "results.csv").read_text().replace(old, new)
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(ValueError, match=r"no table of this program|results of another run|can't be read"):
        paper.tables.main([*arguments, f"--output_dir={tmp_path}"])
    assert (tmp_path / "results.csv").read_text() == text


def test_other_settings_are_refused(paper: Any, folder: Path, arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="its settings is"):
        paper.tables.main([*arguments, "--num_samples=9"])


def test_recoveries_by_another_config_are_refused(
    paper: Any, folder: Path, arguments: list[str], tmp_path: Path
) -> None:
    before = (folder / "results.csv").read_bytes()
    (tmp_path / "other.yaml").write_text(RECOVERY.format(folder=folder.parent).replace("1.0e-2", "1.0e-3"))
    with pytest.raises(ValueError, match=r"recovered by .*recovery .* not by other "):
        paper.tables.main([*arguments, f"--recovery_config={tmp_path / 'other.yaml'}"])
    assert (folder / "results.csv").read_bytes() == before


def test_what_does_not_fit_is_said_before_anything_is_measured(
    paper: Any, arguments: list[str], tmp_path: Path, case: Case
) -> None:
    again = [*arguments, f"--output_dir={tmp_path}"]
    (tmp_path / "bad.yaml").write_text("use_cpu: true\nbf16: false\n")
    with pytest.raises(ValueError, match="sft_dataset"):
        paper.tables.main([*again, f"--recovery_config={tmp_path / 'bad.yaml'}"])
    build("qwen2_moe", num_layers=2).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(case.base).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="`num_layers` is 3"):
        paper.tables.main([*again, "--layers=3", f"--second_model_name_or_path={tmp_path / 'small'}"])
    with pytest.raises(SystemExit):
        paper.tables.main([*again, f"--second_dir={tmp_path}"])
    assert not (tmp_path / "results.csv").exists()


def made_up(paper: Any, path: Path, part: str, values: dict[str, list[list[float]]], metric: str = "loss") -> Any:
    """A CSV with values by method, number of layers and seed."""
    r = paper.results
    results = r.Results(path, "model", "settings")
    results.add(r.Cell("sparse", "sparse", r.Setting()), {metric: 1.0})
    for method, by_layers in values.items():
        for layers, seeds in enumerate(by_layers, 1):
            for seed, value in enumerate(seeds):
                setting = r.Setting("condense", layers, 1, seed, expert_selection=method)
                results.add(r.Cell(part, method, setting), {metric: value})
    return r.Results(path)


@pytest.mark.parametrize("metric", ["loss", "accuracy:x"])
def test_verdicts(paper: Any, tmp_path: Path, metric: str) -> None:
    sign = 1 if metric == "loss" else -1
    values = {"greedy": [[2.0, 2.2], [3.0, 3.0]], "global": [[2.5, 2.9], [3.0, 3.0]], "local": [[2.3, 3.1], [3.0, 3.0]]}
    values = {name: [[sign * v for v in seeds] for seeds in rows] for name, rows in values.items()}
    found = paper.claims.claims(made_up(paper, tmp_path / "r.csv", "table3", values, metric))
    verdicts = {claim.text: (claim.verdict, claim.numbers) for claim in found}
    # Global beats local by -0.2 and 0.2; nothing differs at two layers.
    assert verdicts["global layers beat local ones"][0] == "within the spread"
    verdict, numbers = verdicts["greedy layers beat global ones"]
    assert verdict == "holds"
    assert numbers == ("+0.6000 ± 0.1414 (L1 +0.6000)" if sign == 1 else "+60.0 ± 14.1 (L1 +60.0)")
    swapped = {**values, "greedy": values["global"], "global": values["greedy"]}
    found = paper.claims.claims(made_up(paper, tmp_path / "s.csv", "table3", swapped, metric))
    assert found[0].verdict == "does not hold"


def test_baselines_are_compared_at_the_same_cost(paper: Any) -> None:
    points = [(0.5, 4.0), (0.8, 2.0), (1.0, 1.0)]
    assert paper.claims.interpolate(points, 0.9) == pytest.approx(1.5)
    assert paper.claims.interpolate(points, 0.4) is None


def test_verdicts_on_what_is_kept(paper: Any, tmp_path: Path) -> None:
    """At a third of six layers, and of what recovery adds to it."""
    r = paper.results
    results = r.Results(tmp_path / "r.csv", "model", "settings")
    results.add(r.Cell("sparse", "sparse", r.Setting()), {"accuracy:x": 0.8, "accuracy_error:x": 0.01})
    results.add(r.Cell("figure1", "greedy", r.Setting("condense")), {f"divergence_of_layer_{n}": 1.0 for n in range(6)})
    for part, method, values in (
        ("table1", "CD-MoE E(shared+0)", {1: 0.7, 2: 0.6, 3: 0.5}),
        ("table1", "CD-MoE E(shared+2)", {1: 0.79, 2: 0.7, 3: 0.6}),
        ("figure3", "LM+SFT E(shared+2)", {1: 0.8, 2: 0.82, 3: 0.7}),
        ("figure3", "SFT E(shared+2)", {1: 0.8, 2: 0.7, 3: 0.6}),
    ):
        for n, value in values.items():
            setting = r.Setting("condense", n, int(method[-2]), refit=part)
            results.add(r.Cell(part, method, setting), {"accuracy:x": value})
    found = {claim.text: (claim.verdict, claim.numbers) for claim in paper.claims.claims(results)}
    # 0.7 is 2 points below 0.72, and 0.82 is 3.6 above 0.784.
    verdict, numbers = found["CD-MoE E(shared+2) keeps 90% of the accuracy at a third of the layers"]
    assert verdict == "does not hold"
    assert numbers.startswith("87.5% at L2 of 6, ")
    assert numbers.endswith("beyond 90% by -2.0 ± 1.0 (L2 -2.0; one seed)")
    verdict, numbers = found["LM+SFT E(shared+2) keeps 98% of the accuracy at a third of the layers"]
    assert verdict == "holds"
    assert numbers.startswith("102.5% at L2 of 6, ")
    verdict, numbers = found["LM+SFT E(shared+2) beats CD-MoE E(shared+2) at as many layers"]
    assert (verdict, numbers) == ("holds", "+7.7 ± 1.0 (L1 +1.0, L2 +12.0, L3 +10.0; one seed)")
    assert found["LM+SFT E(shared+2) beats SFT E(shared+2), fine-tuning alone"][0] == "holds"


def test_an_advantage_that_grows(paper: Any) -> None:
    grown = paper.claims.growth({1: {0: 1.0, 1: 2.0}, 2: {0: 9.0}, 3: {0: 4.0, 1: 1.0}})
    assert grown == {3: {0: 3.0, 1: -1.0}}
