"""A search and a refit that processes share, on one machine or two: `accelerate launch`, and what one process finds."""

from __future__ import annotations

import importlib
import json
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from cdmoe_plugin import CondenseConfig, CondensePlan, apply_plan, search_plan
from cdmoe_plugin.processes import Processes
from cdmoe_plugin.scripts import condense
from tests.helpers.plans import some_plan
from tests.helpers.programs import Programs
from tests.helpers.recovery import WORDS, word_tokenizer
from tests.helpers.tiny_models import random_ids, tiny_model

ROOT = Path(__file__).parents[2]
FITTED = {"refit": "down_proj", "refit_neurons": "least_squares"}
CONFIGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "mse": {"metric": "mse"},
    "ppl": {"metric": "ppl", "layer_selection": "global"},
    "logits": {"compare": "logits", "metric": "kl", "expert_selection": "frequency", "layer_selection": "local"},
    "reap": {"expert_selection": "reap", "layers": [3, 1]},
    "d_optimal": {"expert_selection": "d_optimal", "layers": [2]},
    "trimmed": {"form": "trim_layer", "layer_selection": "similarity"},
    "budget": {"num_experts": "auto", "expert_budget": 5},
    "race": {"sequences": 19, "expert_selection": "frequency"},
    # The numbers of layers and experts are the defaults, which have no meaning beside a size.
    "size": {"target_size": 0.7, "num_layers": 9, "num_experts": 6, **FITTED, "sequences": 20},
}

REFITS = {
    # So many sequences and steps that training, at the rate below, improves on the closed form.
    "experts": {"refit": "distill", "refit_steps": 60, "batch_size": 8, "sequences": [80, 64]},
    "neurons": {**FITTED, "refit_target": "block"},
    "mixed": {"refit": "distill", "refit_steps": 60, "batch_size": 8, "sequences": [80, 64], "routed": [1, 3, 4, 6]},
}

# Of Adam in a refit: random weights need smaller steps than trained ones.
RATE = 0.005

# Every process searches by every config, and leaves its plans; then it fits a plan's layers, and leaves the weights.
PROGRAM = """
import importlib, json, sys
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from cdmoe_plugin import CondenseConfig, apply_plan, search_plan
from tests.helpers.plans import some_plan
from tests.helpers.tiny_models import random_ids, tiny_model
torch.set_num_threads(1)
importlib.import_module("cdmoe_plugin.condense.refit.distill")._RELATIVE_RATE = float(sys.argv[4])
folder, configs, refits = sys.argv[1], *map(json.loads, sys.argv[2:4])
accelerator = Accelerator()
assert accelerator.num_processes == 2
model = tiny_model("qwen2_moe")
for name, values in configs.items():
    ids = random_ids(values.pop("sequences", 5))
    config = CondenseConfig(**{"num_layers": 2, "num_experts": 2, "batch_size": 2, **values})
    kwargs = {"calibration": ids, "accelerator": accelerator, "state_dir": f"{folder}/{name}"}
    plan = search_plan(model, config, **kwargs)
    # Again from the main process's state: nothing is left to do.
    assert search_plan(model, config, **kwargs) == plan
    plan.save(f"{folder}/{name}-{accelerator.process_index}.json")
try:
    search_plan(model, CondenseConfig(num_layers=1, num_experts=1), calibration=random_ids(1), accelerator=accelerator)
except ValueError as error:
    print(error)
for name, values in refits.items():
    model = tiny_model("qwen2_moe")
    ids, plan = random_ids(*values.pop("sequences", [13])), some_plan([1], routed=values.pop("routed", None))
    config = CondenseConfig(**{"batch_size": 2, **values})
    apply_plan(model, plan, config, calibration=ids, accelerator=accelerator)
    save_file(model.state_dict(), f"{folder}/{name}-{accelerator.process_index}.safetensors")
"""


def launch(*command: object, programs: Programs, machines: Sequence[Path] = ()) -> str:
    """Two processes on the CPU, on one machine or on two, which share no folder (and so get a Python of their own)."""
    launcher = [programs.python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", str(len(machines) or 1)]
    launcher += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port() if machines else 0)]
    env = {**programs.environment, "ACCELERATE_USE_CPU": "1"}
    started = []
    for rank, folder in enumerate(machines or [None]):
        own = {} if folder is None else {"HF_HOME": str(folder / "cache"), "TMPDIR": str(folder)}
        run = [*launcher, "--machine_rank", str(rank), *map(str, command)]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(run, env=env | own, cwd=folder, **pipes))
    printed = ""
    for process in started:
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        printed += output
    return printed


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_machines_find_what_one_process_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: Programs
) -> None:
    monkeypatch.setattr(importlib.import_module("cdmoe_plugin.condense.refit.distill"), "_RELATIVE_RATE", RATE)
    machines = [tmp_path / "first", tmp_path / "second"]
    for folder in machines:
        folder.mkdir()
        (folder / "program.py").write_text(PROGRAM)
    printed = launch(
        "program.py", ".", json.dumps(CONFIGS), json.dumps(REFITS), RATE, programs=programs, machines=machines
    )
    assert printed.count("makes 1 batches, too few for 2 processes") == 2
    # The first machine alone keeps a state and plans beside it.
    assert [sorted(path.name for path in (folder / "paper").glob("*")) for folder in machines] == [
        ["condense_plan.json", "search_state.json"],
        [],
    ]
    model = tiny_model("qwen2_moe")
    for name, values in CONFIGS.items():
        ids = random_ids(values.get("sequences", 5))
        fields = {name: value for name, value in values.items() if name != "sequences"}
        config = CondenseConfig(**{"num_layers": 2, "num_experts": 2, "batch_size": 2, **fields})
        expected = search_plan(model, config, calibration=ids)
        # To the last bit: sums are over the same batches in the same order.
        plans = [CondensePlan.load(folder / f"{name}-{i}.json") for i, folder in enumerate(machines)]
        if expected.spread is None:
            assert plans == [expected] * 2
        else:  # sums over tokens are equal to rounding
            assert plans[0] == plans[1]
            assert plans[0].layers == expected.layers
        assert plans[0].token_layers == plans[1].token_layers == expected.token_layers
    for name, values in REFITS.items():
        ids, plan = random_ids(*values.get("sequences", [13])), some_plan([1], routed=values.get("routed"))
        fields = {name: value for name, value in values.items() if name not in ("sequences", "routed")}
        config = CondenseConfig(**{"batch_size": 2, **fields})
        one = apply_plan(tiny_model("qwen2_moe"), plan, config, calibration=ids).state_dict()
        two, other = (load_file(folder / f"{name}-{i}.safetensors") for i, folder in enumerate(machines))
        assert one.keys() == two.keys() == other.keys()
        for key, weight in one.items():
            assert torch.equal(two[key], other[key])
            torch.testing.assert_close(two[key], weight, rtol=1e-4, atol=1e-6)
        if config.refit == "distill":  # the closed form leaves this projection as it is folded
            folded = apply_plan(tiny_model("qwen2_moe"), plan).state_dict()
            trained = "shared_expert.up_proj.weight" if plan.layers[0].routed else "up_proj.weight"
            assert not torch.equal(*(weights[f"model.layers.1.mlp.{trained}"] for weights in (one, folded)))


def test_the_recipe(tmp_path: Path, programs: Programs) -> None:
    sparse = tmp_path / "sparse"
    tiny_model("qwen2_moe").save_pretrained(sparse)
    word_tokenizer().save_pretrained(sparse)
    texts = [" ".join(WORDS[(7 * i + j * j) % 100] for j in range(10 + i)) for i in range(6)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = [ROOT / "recipes" / "condense.py", "--model_name_or_path", sparse, "--num_layers", 2, "--num_experts", 2]
    recipe += ["--refit", "distill", "--refit_steps", 9]
    recipe += ["--calibration", tmp_path / "texts.jsonl", "--batch_size", 2, "--state_dir", tmp_path / "state"]
    printed = launch(
        *recipe, "--output_dir", tmp_path / "two", "--offload_folder", tmp_path / "offload", programs=programs
    )
    assert printed.count("Saved to") == 1
    assert sorted(path.name for path in (tmp_path / "offload").iterdir()) == ["process-0", "process-1"]
    args, search = condense.make_parser().parse_args_and_config(args=[str(a) for a in recipe[1:-2]])
    args.output_dir, args.state_dir, args.offload_folder = tmp_path / "one", None, tmp_path / "again"
    condense.run(args, {name: value for name, value in vars(search).items() if value is not None})
    assert CondensePlan.load(tmp_path / "one") == CondensePlan.load(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6)
    errors = [AutoConfig.from_pretrained(tmp_path / name).condense_config["refit_errors"] for name in ("one", "two")]
    assert errors[1] == {layer: pytest.approx(both, rel=1e-4) for layer, both in errors[0].items()}


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
