"""What servers rely on: models split over processes, and classes that vLLM's processes find."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from cdmoe_plugin import CondensedLayer, CondensePlan, apply_plan
from cdmoe_plugin.blocks import find_sparse_blocks
from tests.helpers.models import sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.programs import Programs
from tests.helpers.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# With a gate per token and without, other names for the MLP, no expert kept at all, and a sparse model.
SPLIT = {
    "sparse": ("qwen2_moe", []),
    "gated": ("qwen2_moe", [1]),
    "all": ("deepseek", [1, 2, 3]),
    "feed_forward": ("jamba", [1]),
    "layer_shared": ("granitemoeshared", [0, 2]),
    "empty": ("mixtral", [2]),
}

# Every process opens its part of each checkpoint; the first one leaves logits and how wide its condensed layers are.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
import cdmoe_plugin
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
for name in sys.argv[2:]:
    folder = Path(sys.argv[1]) / name
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 27).view(2, 12)).logits
    specs = (getattr(model.config, "condense_config", None) or {}).get("condensed_layers", {}).values()
    widths = [model.model.get_submodule(spec["module"]).down_proj.weight.to_local().shape[1] for spec in specs]
    if torch.distributed.get_rank() == 0:
        save_file({"logits": logits.contiguous()}, folder / "split.safetensors", {"widths": json.dumps(widths)})
torch.distributed.destroy_process_group()
"""


def condensed(model_type: str, layers: list[int], empty: bool = False) -> PreTrainedModel:
    if not layers:
        return sparse_model(model_type)
    plan = CondensePlan([CondensedLayer(layer, [], []) for layer in layers]) if empty else some_plan(layers)
    return apply_plan(sparse_model(model_type), plan)


@pytest.mark.slow
@pytest.mark.skipif("tp_size" not in signature(DistributedConfig).parameters, reason="another interface in 5.17")
def test_two_processes_compute_what_one_does(tmp_path: Path, programs: Programs) -> None:
    models = {name: condensed(*what, empty=name == "empty") for name, what in SPLIT.items()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [programs.python, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*launcher, str(tmp_path / "program.py"), str(tmp_path), *models]
    result = subprocess.run(command, env=programs.environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    for name, model in models.items():
        with torch.no_grad():
            expected = model(input_ids=torch.arange(3, 27).view(2, 12)).logits
        with safe_open(tmp_path / name / "split.safetensors", "pt") as file:
            torch.testing.assert_close(file.get_tensor("logits"), expected, rtol=1e-4, atol=1e-4, msg=name)
            widths = json.loads(file.metadata()["widths"])
        specs = getattr(model.config, "condense_config", {"condensed_layers": {}})["condensed_layers"].values()
        assert widths == [spec["intermediate_size"] // 2 for spec in specs], name


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek", "jamba", "granitemoeshared", "mixtral"])
def test_split_plan(model_type: str) -> None:
    sparse = sparse_model(model_type)
    blocks = find_sparse_blocks(sparse)
    before = dict(sparse.config.base_model_tp_plan)
    model = apply_plan(sparse, some_plan([blocks[0].layer]))
    plan: Any = model.config.base_model_tp_plan
    # As vLLM reads the patterns, and as transformers does.
    for names in ([rf"{p}$" for p in plan], [re.sub(r"\.\*(?=\.)", r"\\.\\d+", p) + "$" for p in plan]):
        for projection in PROJECTIONS:
            assert any(re.match(name, f"{blocks[0].path}.{projection}") for name in names)
    gated = model.get_submodule(f"model.{blocks[0].path}").shared_expert_gate is not None
    place = re.sub(r"\.\d+\.", ".*.", blocks[0].path)
    styles = ["colwise_gather_output"] * 2 + ["rowwise_split_input"] if gated else ["colwise"] * 2 + ["rowwise"]
    assert [plan[f"{place}.{projection}"] for projection in PROJECTIONS] == styles
    others = {name: style for name, style in before.items() if name.rpartition(".")[2] not in PROJECTIONS}
    assert others.items() <= plan.items()
    assert f"{place}.experts" in plan  # the layers that are still sparse
    assert "tp_plan" not in json.dumps(model.config.to_dict())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "ernie4_5_moe"])
def test_split_plan_of_tied_embeddings(model_type: str, tmp_path: Path) -> None:
    """Some versions of transformers add to the plan of the config object that they make."""
    sparse = tiny_model(model_type, tie_word_embeddings=True)
    before = dict(sparse.config.base_model_tp_plan)
    model = apply_plan(sparse, some_plan([2]))
    assert before.items() <= model.config.base_model_tp_plan.items()
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.base_model_tp_plan == model.config.base_model_tp_plan
    model.config.base_model_tp_plan = {**before, "embed_tokens": "embedding_rowwise"}
    assert model.config.base_model_tp_plan["embed_tokens"] == "embedding_rowwise"
    assert "layers.*.mlp.down_proj" in model.config.base_model_tp_plan


def test_no_split_plan_without_one_of_the_base() -> None:
    assert condensed("dbrx", [2]).config.base_model_tp_plan is None


def test_configs_travel_between_processes(tmp_path: Path) -> None:
    """Servers hand configs to their worker processes, which have asked for none of our classes yet."""
    configs = [condensed(model_type, [1]).config for model_type in ("mixtral", "deepseek")]
    program = "import json, pickle, sys; print(json.dumps([c.to_dict() for c in pickle.load(sys.stdin.buffer)]))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(configs), capture_output=True, env=env)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert json.loads(done.stdout) == json.loads(json.dumps([config.to_dict() for config in configs]))


# What vLLM's transformers backend does with a checkpoint, in its own order, without trust_remote_code.
AS_VLLM = """
import json, sys
from importlib import import_module
import transformers
name, _, function = sys.argv[2].partition(":")
for _ in range(2):
    getattr(import_module(name), function)()
assert "cdmoe_plugin.model.classes" not in sys.modules  # cheap: no model code yet
from transformers import AutoConfig, AutoModel
import torch
found = {}
for folder in sys.argv[3:]:
    config = AutoConfig.from_pretrained(f"{sys.argv[1]}/{folder}")
    model_class = getattr(transformers, config.architectures[0], None)
    with torch.device("meta"):
        model = AutoModel.from_config(config=config, dtype=torch.bfloat16, trust_remote_code=False)
    compatible = model_class.is_backend_compatible()
    found[folder] = [model_class.__name__, compatible, type(model).__name__, model.tp_plan]
assert transformers.Qwen2MoeConfig.__name__ == "Qwen2MoeConfig"
assert getattr(transformers, "CDMoENothing", None) is None and getattr(transformers, "Nothing", None) is None
print(json.dumps(found))
"""


def test_a_process_of_vllm_finds_the_classes(tmp_path: Path) -> None:
    for model_type in ("qwen2_moe", "deepseek"):
        condensed(model_type, [1]).save_pretrained(tmp_path / model_type)
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    entry = entries["vllm.general_plugins"]
    assert entries["sglang.srt.plugins"] == entry
    command = [sys.executable, "-c", AS_VLLM, str(tmp_path), entry["cdmoe"], "qwen2_moe", "deepseek"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    for model_type, name in (("qwen2_moe", "Qwen2Moe"), ("deepseek", "Deepseek")):
        head, compatible, decoder, plan = found[model_type]
        assert [head, compatible, decoder] == [f"CDMoE{name}ForCausalLM", True, f"CDMoE{name}Model"]
        assert {"layers.*.mlp.down_proj", "layers.*.self_attn.q_proj"} <= plan.keys()
