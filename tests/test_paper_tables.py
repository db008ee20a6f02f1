"""recipes/benchmarks/paper_tables.py: what is measured, that nothing is measured twice, and the verdicts."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cdmoe_plugin import CondensePlan, apply_plan
from tests.lm_eval_cases import Case, make_case
from tests.recovery import write_data

pytest.importorskip("lm_eval")
BENCHMARKS = Path(__file__).parent.parent / "recipes" / "benchmarks"
MODULES = ("tables", "bench", "models", "results", "drawing", "claims")
PARTS = "table1,figure1,figure2,figure3,figure4,figure5,refit"


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
    return make_case(folder)


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
        "recovery_dir": case.base.parent,  # in it are the sparse checkpoint and a condensed one
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
    for title in ("Table 1", "Figure 5. Calibration data: held-out loss", "refit: accuracy", "Claims"):
        assert title in text
    assert {path.name for path in folder.glob("*.png")} == {f"figure{i}.png" for i in (1, 2, 3, 5)}
    assert "Figure 4 is left out" in text


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
    same = {row.metric: row.value for row in results.of("figure3") if row.cell.method == "base"}
    assert same["loss"] == results.known(paper.results.Setting())["loss"]
    ratio = sum(p.numel() for p in model.parameters()) / before
    memory = paper.claims.curve(results, "table1", "CD-MoE E(shared+2)", "memory")[2][0]
    assert memory == pytest.approx(ratio, abs=0.01)
    line = next(
        line for line in (folder / "tables.md").read_text().splitlines() if "| CD-MoE E(shared+2) |      2" in line
    )
    assert f"{memory:.1%}" in line
    assert f"{paper.claims.curve(results, 'table1', 'CD-MoE E(shared+2)', 'loss')[2][0]:.4f}" in line


def test_a_second_run_computes_nothing(
    paper: Any, folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "results.csv").read_bytes()
    forbid(monkeypatch, paper.bench, "search_plan", "held_out_loss", "costs")
    forbid(monkeypatch, paper.models, "condense_pretrained", "AutoModelForCausalLM")
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
    (tmp_path / "results.csv").write_bytes((folder / "results.csv").read_bytes())
    monkeypatch.setattr(paper.tables, "Bench", None)
    more = [f"--second_dir={folder}", f"--only={PARTS}"]
    paper.tables.main(["--draw_only", f"--output_dir={tmp_path}", *more])
    assert (tmp_path / "figure4.png").exists()
    mine, theirs = ((path / "tables.md").read_text().split("### Figures") for path in (tmp_path, folder))
    assert mine[0] == theirs[0]


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
