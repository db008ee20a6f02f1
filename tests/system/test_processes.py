"""A search that several processes share: real processes of `accelerate launch`, and the plan that one finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cdmoe_plugin import CondenseConfig, CondensePlan, search_plan
from cdmoe_plugin.scripts import condense
from cdmoe_plugin.search.processes import Processes
from tests.helpers.recovery import WORDS, word_tokenizer
from tests.helpers.tiny_models import random_ids, tiny_model

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "paper": {},
    "mse": {"metric": "mse"},
    "ppl": {"metric": "ppl", "layer_selection": "global"},
    "logits": {"compare": "logits", "metric": "kl", "expert_selection": "frequency", "layer_selection": "local"},
    "reap": {"expert_selection": "reap", "layers": [3, 1]},
    "d_optimal": {"expert_selection": "d_optimal", "layers": [2]},
    "trimmed": {"form": "trim_layer", "layer_selection": "similarity"},
    "budget": {"num_experts": "auto", "expert_budget": 5},
}

# Every process searches by every config, and leaves its plans.
PROGRAM = """
import json, sys
import torch
from accelerate import Accelerator
from cdmoe_plugin import CondenseConfig, search_plan
from tests.helpers.tiny_models import random_ids, tiny_model
torch.set_num_threads(1)
folder, configs = sys.argv[1], json.loads(sys.argv[2])
accelerator = Accelerator()
assert accelerator.num_processes == 2
model = tiny_model("qwen2_moe")
for name, values in configs.items():
    config = CondenseConfig(**{"num_layers": 2, "num_experts": 2, "batch_size": 2, **values})
    kwargs = {"calibration": random_ids(5), "accelerator": accelerator, "state_dir": f"{folder}/{name}"}
    plan = search_plan(model, config, **kwargs)
    # Again from the main process's state: nothing is left to do.
    assert search_plan(model, config, **kwargs) == plan
    plan.save(f"{folder}/{name}-{accelerator.process_index}.json")
try:
    search_plan(model, CondenseConfig(num_layers=1, num_experts=1), calibration=random_ids(1), accelerator=accelerator)
except ValueError as error:
    print(error)
"""


def launch(*command: object) -> str:
    """Two processes on the CPU."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run([*launcher, *map(str, command)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    printed = launch(tmp_path / "program.py", tmp_path, json.dumps(CONFIGS))
    assert printed.count("makes 1 batches, too few for 2 processes") == 2
    model = tiny_model("qwen2_moe")
    for name, values in CONFIGS.items():
        config = CondenseConfig(**{"num_layers": 2, "num_experts": 2, "batch_size": 2, **values})
        expected = search_plan(model, config, calibration=random_ids(5))
        # To the last bit: sums are over the same batches in the same order.
        assert [CondensePlan.load(tmp_path / f"{name}-{i}.json") for i in range(2)] == [expected] * 2


def test_the_recipe(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    tiny_model("qwen2_moe").save_pretrained(sparse)
    word_tokenizer().save_pretrained(sparse)
    texts = [" ".join(WORDS[(7 * i + j * j) % 100] for j in range(10 + i)) for i in range(6)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = [ROOT / "recipes" / "condense.py", "--model_name_or_path", sparse, "--num_layers", 2, "--num_experts", 2]
    recipe += ["--calibration", tmp_path / "texts.jsonl", "--batch_size", 2, "--state_dir", tmp_path / "state"]
    printed = launch(*recipe, "--output_dir", tmp_path / "two", "--offload_folder", tmp_path / "offload")
    assert printed.count("Saved to") == 1
    assert sorted(path.name for path in (tmp_path / "offload").iterdir()) == ["process-0", "process-1"]
    args, search = condense.make_parser().parse_args_and_config(args=[str(a) for a in recipe[1:-2]])
    args.output_dir, args.state_dir, args.offload_folder = tmp_path / "one", None, tmp_path / "again"
    condense.run(args, {name: value for name, value in vars(search).items() if value is not None})
    assert CondensePlan.load(tmp_path / "one") == CondensePlan.load(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_one_process_adds_batch_by_batch() -> None:
    processes = Processes(None, 3)
    assert processes.is_main
    assert processes.mine("abc") == ["a", "b", "c"]
    assert processes.agreed({"a": 1}) == {"a": 1}
    parts = [torch.tensor([1e20, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([-1e20, 3.0])]
    assert processes.total(parts).tolist() == [0.0, 6.0]
    assert processes.total(parts).dtype == torch.float64


@pytest.mark.parametrize("batches", [1, 3])
def test_every_process_needs_a_batch(batches: int) -> None:
    class Four:
        num_processes, process_index = 4, 1

    with pytest.raises(ValueError, match=rf"makes {batches} batches, too few for 4 processes: use a smaller"):
        Processes(Four(), batches)  # type: ignore[arg-type]
