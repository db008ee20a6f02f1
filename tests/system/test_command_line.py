"""Every command of `cdmoe` in processes of its own, from a folder outside the checkout, on a tiny model.

A search and what happens at Ctrl-C start a real Python, the others a fork (tests/helpers/programs.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from cdmoe_plugin import CondensePlan
from tests.helpers.lm_eval_cases import ROOT, TASKS, make_case
from tests.helpers.programs import Programs
from tests.helpers.recovery import lm_rows, write_data

pytestmark = pytest.mark.slow

# Installed packages, and of this checkout the package alone.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
SEARCH = "--model_name_or_path base --num_layers 2 --num_experts 2 --calibration texts.jsonl"
RECOVER = "--model_name_or_path condensed --lm_dataset lm.jsonl --sft_dataset sft.json --max_length 32 --num_held_out 6"
RECOVER += " --use_cpu --bf16 false --report_to none --per_device_train_batch_size 4 --disable_tqdm true"
TWO = "--multi_gpu --num_processes 2 --main_process_port 0"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model `base`, its form `condensed`, `plan.json`, and data."""
    folder = tmp_path_factory.mktemp("elsewhere")
    make_case(folder)
    write_data(folder)
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lm_rows(8)))
    return folder


def start(place: Path, words: str, programs: Programs | None = None, **env: str) -> subprocess.Popen[str]:
    python, environment = (sys.executable, ENVIRONMENT) if programs is None else (programs.python, programs.environment)
    command = [python, "-m", "cdmoe_plugin", *words.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=place, env={**environment, **env}, start_new_session=True, **pipes)


def run(place: Path, words: str, programs: Programs | None = None, code: int = 0, **env: str) -> tuple[str, str]:
    """What a command prints to both streams."""
    process = start(place, words, programs, **env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    return out, err


def test_condense_and_plan(place: Path, programs: Programs) -> None:
    estimated, _ = run(place, "estimate --model_name_or_path base --num_layers 2 --num_experts 2", programs)
    out, _ = run(place, f"condense {SEARCH} --output_dir cd2")
    model = AutoModelForCausalLM.from_pretrained(place / "cd2")
    assert f"Saved to cd2: {model.num_parameters():,} parameters." in out
    assert f"{model.num_parameters():,}" in estimated
    shown, _ = run(place, "plan show cd2", programs)
    assert out.splitlines()[0] in shown
    run(place, "plan truncate cd2 --num_layers 1 --output_file cd1.json", programs)
    assert CondensePlan.load(place / "cd1.json") == CondensePlan.load(place / "cd2").truncate(num_layers=1)
    compared, _ = run(place, "plan compare cd2 cd1.json", programs)
    assert "the first 1 are the same" in compared


def test_export(place: Path, programs: Programs) -> None:
    _, err = run(place, "export condensed --output_dir stock", programs, code=2)
    assert err.splitlines()[-1].startswith("cdmoe export: error: The decoder layers")
    run(place, "export condensed --output_dir stock --approximate --calibration texts.jsonl --num_samples 4", programs)
    assert type(AutoModelForCausalLM.from_pretrained(place / "stock")).__name__ == "Qwen2MoeForCausalLM"


def test_evaluate(place: Path, programs: Programs) -> None:
    tasks = f"--tasks {','.join(TASKS)} --include_path tasks"
    out, _ = run(place, f"evaluate --model_args pretrained=condensed {tasks}", programs)
    assert all(task in out for task in TASKS)
    out, _ = run(place, "evaluate --help", programs)
    assert "cdmoe evaluate --model_args pretrained=" in out
    assert "--num_fewshot" in out


@pytest.mark.parametrize("processes", [1, 2])
def test_recover(processes: int, place: Path, programs: Programs) -> None:
    launch = TWO if processes == 2 else "--num_processes 1"
    env = {"ACCELERATE_USE_CPU": "1"}
    output = f"recovered{processes}"
    out, _ = run(place, f"recover {launch} {RECOVER} --max_steps 2 --output_dir {output}", programs, **env)
    assert f"{processes} processes" in out
    assert out.count(f"Saved to {output}.") == 1
    assert type(AutoModelForCausalLM.from_pretrained(place / output)).__name__ == "CDMoEQwen2MoeForCausalLM"
    # The same again is a mistake that only the main process sees.
    _, err = run(place, f"recover {launch} {RECOVER} --max_steps 2 --output_dir {output}", programs, code=2, **env)
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    assert err.splitlines()[-1].startswith(f"cdmoe recover: error: `--output_dir` {output} is not an empty folder")


def test_a_mistake_under_accelerate_launch(place: Path, programs: Programs) -> None:
    """accelerate adds what it has to say; the recipe itself says one line."""
    launch = [programs.python, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    recipe = [str(ROOT / "recipes" / "lm_then_sft.py"), *RECOVER.split(), "--max_step", "2"]
    env = {**programs.environment, "ACCELERATE_USE_CPU": "1"}
    command = [*launch, *TWO.split(), "--dynamo_backend", "no", *recipe]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("cdmoe recover: error: unknown option --max_step; did you mean --max_steps?") == 1
    assert "recover_stages.py" not in done.stderr


@pytest.mark.parametrize("command", ["condense", "recover"])
def test_interrupted(command: str, place: Path, tmp_path: Path) -> None:
    words, begun, kept = {
        "condense": (
            f"{SEARCH} --refit distill --refit_steps 1000000 --state_dir {tmp_path / 'state'}",
            tmp_path / "state" / "condense_plan.json",
            f"its plan is in {tmp_path / 'state'}; the same command only condenses and saves.",
        ),
        "recover": (
            f"{RECOVER} --save_steps 1 --num_train_epochs 1000",
            tmp_path / "out" / "lm" / "checkpoint-2" / "trainer_state.json",
            "; the same command with `--resume_from_checkpoint true` goes on from there.",
        ),
    }[command]
    process = start(place, f"{command} {words} --output_dir {tmp_path / 'out'}")
    end = time.monotonic() + 120
    while not begun.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err[-3000:]
    assert "Traceback" not in err
    assert err.count(f"cdmoe {command}: interrupted. ") == 1
    assert kept in err.splitlines()[-1]
    if command == "recover":
        assert "/lm/checkpoint-" in err.splitlines()[-1]
