"""`lm_eval --model cdmoe` from the shell, in one process and in two, and the recipe with the paper's tasks."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.lm_eval_cases import (
    ROOT,
    ROWS,
    TASKS,
    Case,
    answers,
    evaluate,
    evaluate_from_shell,
    make_case,
    run,
    script,
)
from tests.helpers.programs import Programs


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("shell"))


@pytest.fixture(scope="module")
def expected(case: Case) -> dict[str, Any]:
    return answers(evaluate(case, "hf", pretrained=case.condensed, device="cpu"))


@pytest.mark.slow
def test_console_script(case: Case, expected: dict[str, Any], tmp_path: Path) -> None:
    results, said = evaluate_from_shell(case, [script("lm_eval")], tmp_path, f"pretrained={case.condensed}")
    assert answers(results) == expected
    assert [len(results["samples"][task]) for task in TASKS] == [ROWS, ROWS]
    config = results["config"]
    assert f"| {config['model_num_parameters']:,} " in said
    assert f"{config['generation']['tokens_per_second']:,.1f} |" in said
    assert config["peak_memory_bytes"] > config["model_weight_bytes"] > 0


@pytest.mark.slow
def test_hf_gives_the_same_and_is_unharmed(
    case: Case, expected: dict[str, Any], tmp_path: Path, programs: Programs
) -> None:
    arguments = f"pretrained={case.condensed},trust_remote_code=True"
    module = [programs.python, "-m", "lm_eval"]
    results, said = evaluate_from_shell(case, module, tmp_path, arguments, model="hf", **programs.environment)
    assert answers(results) == expected
    assert "tokens/s" not in said


@pytest.mark.slow
def test_two_processes_share_the_samples(
    case: Case, expected: dict[str, Any], tmp_path: Path, programs: Programs
) -> None:
    launcher = [programs.folder / "accelerate", "launch", "--multi_gpu", "--num_processes", 2, "-m", "lm_eval"]
    arguments = f"pretrained={case.base},plan={case.plan_file}"
    environment = {**programs.environment, "ACCELERATE_USE_CPU": "1"}
    results, said = evaluate_from_shell(case, launcher, tmp_path, arguments, **environment)
    assert answers(results) == expected
    for task in TASKS:
        for rank in (0, 1):
            assert f"Building contexts for {task} on rank {rank}" in said
    assert results["config"]["generation"]["tokens_per_second"] > 0


def test_paper_tasks_script(case: Case, tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "evaluate.sh"
    (tmp_path / "lm_eval").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "lm_eval").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    said = run([recipe, "my model,plan=p.json", "--limit", 2], env).stdout.splitlines()
    assert said[said.index("--model_args") + 1] == "pretrained=my model,plan=p.json"
    assert said[-2:] == ["--limit", "2"]
    # tests/recipes/test_docs.py runs them.
    assert len(said[said.index("--tasks") + 1].split(",")) == 8
    refused = subprocess.run([recipe], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "usage" in refused.stderr
