"""A condensed checkpoint opens with the package, as remote code without it, and otherwise not at all."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2MoeForCausalLM

from cdmoe_plugin import CondenseConfig, condense_pretrained
from cdmoe_plugin.modeling_cdmoe import condensed_model_class
from cdmoe_plugin.models.deepseek.modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from tests.tiny_models import random_ids, tiny_model

IDS = random_ids()
CLASSES = {
    "qwen2_moe": "CDMoEQwen2MoeForCausalLM",
    "granitemoeshared": "CDMoEGraniteMoeSharedForCausalLM",
    "deepseek": "CDMoEDeepseekForCausalLM",
}
# What every program below begins with; argv[1] is the folder with the checkpoints.
PRELUDE = """
import json, sys
from pathlib import Path
root, found = Path(sys.argv[1]), {}
"""
OPEN = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from safetensors.torch import load_file
expected = load_file(root / "expected.safetensors")

def logits(model, **kwargs):
    with torch.no_grad():
        return model.eval()(expected["ids"]).logits

def describe(model):
    return [type(model).__module__, type(model).__name__]
"""
WITH_PACKAGE = (
    PRELUDE
    + """
import transformers
from transformers import AutoModelForCausalLM
before = set(sys.modules)
import cdmoe_plugin
found["imported"] = sorted(set(sys.modules) - before)
found["all"] = sorted(sys.modules)
"""
    + OPEN
    + """
qwen = root / "qwen2_moe"
found["config"] = describe(AutoConfig.from_pretrained(qwen))
for name in ("qwen2_moe", "granitemoeshared", "deepseek"):
    model = AutoModelForCausalLM.from_pretrained(root / name)
    found[name] = describe(model), torch.equal(logits(model), expected[name])
found["base"] = describe(AutoModel.from_pretrained(qwen))
head = AutoModelForSequenceClassification.from_pretrained(qwen, num_labels=3)
found["head"] = describe(head), list(logits(head).shape), torch.equal(
    head.model(expected["ids"]).last_hidden_state, AutoModel.from_pretrained(qwen)(expected["ids"]).last_hidden_state
)
half = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.bfloat16)
found["bfloat16"] = sorted({str(p.dtype) for p in half.parameters()}), bool(logits(half).isfinite().all())
layers = {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
split = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk", **layers}
for name, device_map in {"cpu": "cpu", "auto": "auto", "split": split}.items():
    model = AutoModelForCausalLM.from_pretrained(qwen, device_map=device_map, offload_folder=root / "offload")
    found[name] = describe(model), torch.equal(logits(model), expected["qwen2_moe"])
found["offloaded"] = model.model.layers[3].mlp.gate_proj.weight.device.type
print("\\n" + json.dumps(found))
"""
)
AS_REMOTE_CODE = (
    PRELUDE
    + """
sys.modules["cdmoe_plugin"] = None
"""
    + OPEN
    + """
for name in ("qwen2_moe", "granitemoeshared", "deepseek"):
    model = AutoModelForCausalLM.from_pretrained(root / name, trust_remote_code=True)
    model.save_pretrained(root / "again" / name)
    again = AutoModelForCausalLM.from_pretrained(root / "again" / name, trust_remote_code=True)
    same = [torch.equal(logits(m), expected[name]) for m in (model, again)]
    found[name] = [describe(model), describe(again), same, model.condense_plan == again.condense_plan]
found["plan"] = model.condense_plan
for name in ("qwen2_moe", "deepseek"):
    head = AutoModelForSequenceClassification.from_pretrained(root / name, trust_remote_code=True, num_labels=3)
    found[f"{name} head"] = [*describe(head), list(logits(head).shape)]
print("\\n" + json.dumps(found))
"""
)
WITH_NEITHER = (
    PRELUDE
    + """
sys.modules["cdmoe_plugin"] = None
from transformers import AutoConfig, AutoModelForCausalLM
for name in ("qwen2_moe", "without auto_map"):
    for opener in (AutoModelForCausalLM, AutoConfig):
        for stdin in ("empty", "closed"):
            if stdin == "closed":
                sys.stdin.close()
            try:
                found[f"{name} {opener.__name__} {stdin}"] = repr(opener.from_pretrained(root / name))
            except ValueError as error:
                found[f"{name} {opener.__name__} {stdin}"] = ["ValueError", str(error)]
print("\\n" + json.dumps(found))
"""
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Condensed checkpoints of three architectures, with their logits."""
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "pad_token_id": 0}
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    deepseek = DeepseekForCausalLM(DeepseekConfig(num_attention_heads=4, first_k_dense_replace=1, **sizes, **experts))
    path = tmp_path_factory.mktemp("checkpoints")
    expected = {"ids": torch.tensor([IDS[0]])}
    for name in CLASSES:
        model = deepseek.eval() if name == "deepseek" else tiny_model(name)
        number = 3 if name == "deepseek" else 2
        condense_pretrained(model, CondenseConfig(num_layers=number, num_experts=2), calibration=IDS)
        model.save_pretrained(path / name)
        with torch.no_grad():
            expected[name] = model(expected["ids"]).logits
    save_file(expected, path / "expected.safetensors")
    shutil.copytree(path / "qwen2_moe", path / "without auto_map")
    edit_config(path / "without auto_map", lambda config: config.pop("auto_map"))
    return path


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def run(program: str, root: Path, tmp_path: Path) -> dict[str, Any]:
    """What a program prints in a Python of its own, with a cache of its own and nothing to read."""
    places = {"HF_HOME": tmp_path, "HF_MODULES_CACHE": tmp_path / "modules", "HF_HUB_OFFLINE": 1, "OMP_NUM_THREADS": 1}
    env = {**os.environ, **{name: str(value) for name, value in places.items()}}
    command = [sys.executable, "-c", program, str(root)]
    done = subprocess.run(command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_with_the_package(root: Path, tmp_path: Path) -> None:
    found = run(WITH_PACKAGE, root, tmp_path)
    # Importing the package costs nothing: it brings itself and the registration, no architecture, no other library.
    assert found["imported"] == ["cdmoe_plugin", "cdmoe_plugin.registration"]
    heavy = {"trl", "peft", "lm_eval", "datasets", "matplotlib", "bitsandbytes"}
    assert not heavy & {name.partition(".")[0] for name in found["all"]}
    models = [name for name in found["all"] if name.startswith("transformers.models.") and ".modeling_" in name]
    assert models == ["transformers.models.auto.modeling_auto"]

    ours = "cdmoe_plugin.modeling_cdmoe"
    for name, class_name in CLASSES.items():
        assert found[name] == [[ours, class_name], True]
    assert found["config"] == [ours, "CDMoEQwen2MoeConfig"]
    assert found["base"] == [ours, "CDMoEQwen2MoeModel"]
    assert found["head"] == [[ours, "CDMoEQwen2MoeForSequenceClassification"], [1, 3], True]
    assert found["bfloat16"] == [["torch.bfloat16"], True]
    for name in ("cpu", "auto", "split"):
        assert found[name] == [[ours, "CDMoEQwen2MoeForCausalLM"], True]
    assert found["offloaded"] == "meta"


@pytest.mark.slow
def test_as_remote_code(root: Path, tmp_path: Path) -> None:
    found = run(AS_REMOTE_CODE, root, tmp_path)
    for name, class_name in CLASSES.items():
        first, again, same, same_plan = found[name]
        assert first[0].startswith("transformers_modules.")
        assert again[0].startswith("transformers_modules.")
        assert first[1] == again[1] == class_name
        assert same == [True, True]
        assert same_plan
        if f"{name} head" in found:
            assert found[f"{name} head"][1:] == [class_name.replace("CausalLM", "SequenceClassification"), [1, 3]]
        for file in ("model.safetensors", "config.json", "condense_plan.json", "modeling_cdmoe.py"):
            assert (root / "again" / name / file).read_bytes() == (root / name / file).read_bytes(), (name, file)
    assert found["plan"] == json.loads((root / "deepseek" / "condense_plan.json").read_text())


@pytest.mark.slow
def test_with_neither(root: Path, tmp_path: Path) -> None:
    for case, (error, message) in run(WITH_NEITHER, root, tmp_path).items():
        assert error == "ValueError", case
        assert ("cdmoe_qwen2_moe" if "without" in case else "trust_remote_code=True") in message, case


@pytest.mark.parametrize("name", CLASSES)
def test_the_modeling_file_stands_alone(name: str, root: Path) -> None:
    tree = ast.parse((root / name / "modeling_cdmoe.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)
            imported.add(str(node.module).partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert ("DeepseekForCausalLM" in own) == (name == "deepseek")


# --- checkpoints that are not what they say ---

GATE = "model.layers.{}.mlp.gate_proj.weight"


def damaged(root: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of a checkpoint, and the first of its condensed layers."""
    shutil.copytree(root / "qwen2_moe", tmp_path / "damaged")
    config = json.loads((tmp_path / "damaged" / "config.json").read_text())
    return tmp_path / "damaged", min(config["condense_config"]["condensed_layers"])


@pytest.mark.parametrize(
    ("tensor", "rows"),
    [
        (GATE, None),
        ("model.layers.0.self_attn.q_proj.weight", None),
        ("model.norm.weight", None),
        ("lm_head.weight", None),
        (GATE, 40),
        ("lm_head.weight", 100),
        ("model.layers.{}.mlp.gate.weight", 8),  # a router, for which there is no place
    ],
)
@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_wrong_tensors(
    tensor: str, rows: int | None, ignore_mismatched_sizes: bool, root: Path, tmp_path: Path
) -> None:
    folder, layer = damaged(root, tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = tensor.format(layer)
    weights[name] = torch.zeros(rows or 1, 32)
    if rows is None:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=rf"{name}|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=ignore_mismatched_sizes)


MISSING = object()
SPEC_EDITS: list[tuple[str, Any]] = [
    ("intermediate_size", 40),
    ("intermediate_size", -1),
    ("intermediate_size", "56"),
    ("intermediate_size", None),
    ("shared_intermediate_size", 1000),
    ("shared_expert_gate", False),
    ("bias", True),
    ("hidden_act", "magic"),
    ("hidden_act", MISSING),
    ("omitted", MISSING),
    ("module", "layers.9.mlp"),
    ("module", "layers.2.router"),
    ("module", "layers.0.self_attn"),
    ("module", None),
    ("omitted", ["input_layernorm"]),
    ("omitted", ["shared_mlp"]),
]


@pytest.mark.parametrize(("field", "value"), SPEC_EDITS)
def test_wrong_description_of_a_layer(field: str, value: Any, root: Path, tmp_path: Path) -> None:
    folder, layer = damaged(root, tmp_path)

    def edit(config: dict[str, Any]) -> None:
        spec = config["condense_config"]["condensed_layers"][layer]
        spec[field] = value
        if value is MISSING:
            del spec[field]

    edit_config(folder, edit)
    with pytest.raises((ValueError, RuntimeError), match=rf"layer {layer}|layers\.\d|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "wrong", [None, "greedy", [1], {}, {"condensed_layers": [1]}, {"condensed_layers": {"2": "wide"}}]
)
def test_wrong_condense_config(wrong: Any, root: Path, tmp_path: Path) -> None:
    folder, _ = damaged(root, tmp_path)
    edit_config(folder, lambda config: config.update(condense_config=wrong))
    with pytest.raises(ValueError, match="condense_config"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_sparse_checkpoint_is_not_condensed(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    condensed = condensed_model_class(Qwen2MoeForCausalLM)
    with pytest.raises(ValueError, match=r"condense_config.*not condensed"):
        condensed.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"condense_config.*not condensed"):
        condensed(condensed.config_class.from_pretrained(tmp_path))


@pytest.mark.parametrize("model_type", ["cdmoe_magic", "cdmoe_", "cdmoe_qwen3_moe", "cdmoe_llama", "cdmoe_deepseek"])
def test_wrong_model_type(model_type: str, root: Path, tmp_path: Path) -> None:
    folder, _ = damaged(root, tmp_path)
    edit_config(folder, lambda config: (config.update(model_type=model_type), config.pop("auto_map")))
    with pytest.raises(ValueError, match=f"{model_type}|lacks .* weights"):
        AutoModelForCausalLM.from_pretrained(folder)
    if model_type in ("cdmoe_magic", "cdmoe_"):
        with pytest.raises(ValueError, match=model_type):
            AutoConfig.from_pretrained(folder)
