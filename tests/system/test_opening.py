"""A condensed checkpoint opens with the package, as remote code without it, and otherwise not at all."""

import ast
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2MoeForCausalLM

from cdmoe_plugin import CondenseConfig, condense_pretrained
from cdmoe_plugin.model.classes import condensed_model_class
from cdmoe_plugin.model.modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from tests.helpers.own_process import WITHOUT_PACKAGE, answer_of
from tests.helpers.tiny_models import random_ids, tiny_model

IDS = random_ids()
NAMES = {"qwen2_moe": "Qwen2Moe", "granitemoeshared": "GraniteMoeShared", "gpt_oss": "GptOss", "deepseek": "Deepseek"}
CODE = {name: {"modeling_cdmoe.py", "layers_cdmoe.py"} for name in NAMES}
CODE["deepseek"].add("modeling_deepseek.py")
COMMIT = 40 * "a"
MISSING = object()

# Programs for a Python of their own; argv[1] is the folder with the checkpoints, the last line printed is the answer.
WITH_PACKAGE = """
import json, sys
import transformers
from transformers import AutoModelForCausalLM
before = set(sys.modules)
import cdmoe_plugin
found = {"imported": sorted(set(sys.modules) - before), "all": sorted(sys.modules)}
"""
OPEN = """
import json
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
root = Path(sys.argv[1])
expected = load_file(root / "expected.safetensors")

def describe(model, name=None):
    with torch.no_grad():
        logits = model.eval()(expected["ids"])[0]
    same = name and torch.equal(logits, expected[name])
    return [type(model).__module__, type(model).__name__, list(logits.shape) if name is None else same]

def answer():
    print("\\n" + json.dumps(found))
"""
LOCALLY = """
for name in ("qwen2_moe", "granitemoeshared", "gpt_oss", "deepseek"):
    found[name] = describe(AutoModelForCausalLM.from_pretrained(root / name), name)
qwen = root / "qwen2_moe"
found["config"] = type(AutoConfig.from_pretrained(qwen)).__name__
found["base"] = describe(AutoModel.from_pretrained(qwen), "hidden")
head = AutoModelForSequenceClassification.from_pretrained(qwen, num_labels=3)
found["head"] = [*describe(head), *describe(head.model, "hidden")]
half = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.bfloat16)
found["bfloat16"] = [*describe(half), sorted({str(p.dtype) for p in half.parameters()})]
layers = {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
split = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk", **layers}
for name, device_map in {"cpu": "cpu", "auto": "auto", "split": split}.items():
    model = AutoModelForCausalLM.from_pretrained(qwen, device_map=device_map, offload_folder=root / "offload")
    found[name] = describe(model, "qwen2_moe")
found["offloaded"] = model.model.layers[3].mlp.gate_proj.weight.device.type
answer()
"""
AS_REMOTE_CODE = """
found = {}
for name in ("qwen2_moe", "granitemoeshared", "gpt_oss", "deepseek"):
    model = AutoModelForCausalLM.from_pretrained(root / name, trust_remote_code=True)
    model.save_pretrained(root / "again" / name)
    again = AutoModelForCausalLM.from_pretrained(root / "again" / name, trust_remote_code=True)
    found[name] = describe(model, name), describe(again, name), model.condense_plan
    model = AutoModelForCausalLM.from_pretrained(f"me/{name}", trust_remote_code=True)  # as the hub's cache has it
    found[f"{name} of the hub"] = describe(model, name)
    found[f"{name} unknown"] = hasattr(sys.modules[type(model).__module__], "CDMoEDeepseekNothing")
for name in ("qwen2_moe", "deepseek"):
    head = AutoModelForSequenceClassification.from_pretrained(root / name, trust_remote_code=True, num_labels=3)
    found[f"{name} head"] = describe(head)
answer()
"""
REFUSED = """
found = {}
for stdin in ("empty", "closed"):
    for name in ("qwen2_moe", "without auto_map"):
        for opener in (AutoModelForCausalLM, AutoModel, AutoConfig):
            try:
                found[f"{name} {opener.__name__} {stdin}"] = repr(opener.from_pretrained(root / name))
            except ValueError as error:
                found[f"{name} {opener.__name__} {stdin}"] = f"ValueError: {error}"
    sys.stdin.close()
answer()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Condensed checkpoints of three architectures, with their logits."""
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4}
    sizes |= {"moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2}
    sizes |= {"num_attention_heads": 4, "first_k_dense_replace": 1, "bos_token_id": 1, "eos_token_id": 2}
    path, expected = tmp_path_factory.mktemp("checkpoints"), {"ids": torch.tensor([IDS[0]])}
    torch.manual_seed(0)
    for name in NAMES:
        model = DeepseekForCausalLM(DeepseekConfig(**sizes)).eval() if name == "deepseek" else tiny_model(name)
        gates = {"refit": "down_proj", "gates": "sigmoid"} if name == "granitemoeshared" else {}
        config = CondenseConfig(layers=[1, 2, 3] if name == "deepseek" else [3, 1], num_experts=2, **gates)
        condense_pretrained(model, config, calibration=IDS).save_pretrained(path / name)
        with torch.no_grad():
            expected[name] = model(expected["ids"]).logits
            if name == "qwen2_moe":
                expected["hidden"] = model.model(expected["ids"]).last_hidden_state
    save_file(expected, path / "expected.safetensors")
    shutil.copytree(path / "qwen2_moe", path / "without auto_map")
    edit_config(path / "without auto_map", "auto_map", MISSING)
    return path


def edit_config(folder: Path, place: str, value: Any) -> None:
    """Sets (or removes) one entry of a checkpoint's config.json."""
    config = spot = json.loads((folder / "config.json").read_text())
    *path, last = place.split(".")
    for key in path:
        spot = spot[key]
    spot[last] = value
    if value is MISSING:
        del spot[last]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_with_the_package(root: Path, tmp_path: Path) -> None:
    found = answer_of(WITH_PACKAGE + OPEN + LOCALLY, root, tmp_path)
    # Importing the package costs next to nothing: no architecture, and none of the libraries that only some need.
    ours = ["cdmoe_plugin", "cdmoe_plugin.after_import", "cdmoe_plugin.model", "cdmoe_plugin.model.registration"]
    assert found["imported"] == ours
    heavy = {"trl", "peft", "lm_eval", "datasets", "matplotlib", "bitsandbytes"}
    assert not heavy & {name.partition(".")[0] for name in found["all"]}
    files = [name for name in found["all"] if name.startswith("transformers.models.") and ".modeling_" in name]
    assert files == ["transformers.models.auto.modeling_auto"]

    ours = "cdmoe_plugin.model.classes"
    for name, prefix in NAMES.items():
        assert found[name] == [ours, f"CDMoE{prefix}ForCausalLM", True]
    assert found["config"] == "CDMoEQwen2MoeConfig"
    assert found["base"] == [ours, "CDMoEQwen2MoeModel", True]
    assert found["head"] == [ours, "CDMoEQwen2MoeForSequenceClassification", [1, 3], ours, "CDMoEQwen2MoeModel", True]
    assert found["bfloat16"] == [ours, "CDMoEQwen2MoeForCausalLM", [1, len(IDS[0]), 128], ["torch.bfloat16"]]
    assert found["cpu"] == found["auto"] == found["split"] == [ours, "CDMoEQwen2MoeForCausalLM", True]
    assert found["offloaded"] == "meta"


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import cdmoe_plugin, transformers",
        "from transformers import AutoModelForCausalLM; import cdmoe_plugin, transformers",
        "import cdmoe_plugin.model.registration, transformers",  # as the entry point for vLLM does
        "import cdmoe_plugin.api; from transformers.models.auto import modeling_auto; import transformers",
    ],
)
def test_whatever_is_imported_first(imports: str, tmp_path: Path) -> None:
    program = f"""
{imports}
import json
print(json.dumps(type(transformers.AutoConfig.for_model("cdmoe_qwen2_moe")).__name__))
"""
    assert answer_of(program, tmp_path, tmp_path) == "CDMoEQwen2MoeConfig"


@pytest.mark.slow
def test_an_unpickled_model_brings_its_class(root: Path, tmp_path: Path) -> None:
    import pickle

    model = AutoModelForCausalLM.from_pretrained(root / "qwen2_moe")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    program = """
import json, pickle, sys
from pathlib import Path
model = pickle.loads((Path(sys.argv[1]) / "model.pickle").read_bytes())
import transformers
config = transformers.AutoConfig.for_model(model.config.model_type)
print(json.dumps([type(model).__name__, type(config).__name__, type(config) is type(model.config)]))
"""
    names = ["CDMoEQwen2MoeForCausalLM", "CDMoEQwen2MoeConfig", True]
    assert answer_of(program, tmp_path, tmp_path) == names


@pytest.mark.slow
def test_as_remote_code(root: Path, tmp_path: Path) -> None:
    for name in NAMES:
        repository = tmp_path / "hub" / f"models--me--{name}"
        shutil.copytree(root / name, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    expected = load_file(root / "expected.safetensors")
    found = answer_of(WITHOUT_PACKAGE + OPEN + AS_REMOTE_CODE, root, tmp_path)
    for name, prefix in NAMES.items():
        first, again, plan = found[name]
        for module, class_name, same in (first, again):
            assert (module.partition(".")[0], class_name) == ("transformers_modules", f"CDMoE{prefix}ForCausalLM")
            assert same
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(root / "again" / name)(expected["ids"]).logits
        assert torch.equal(logits, expected[name])
        assert plan == json.loads((root / name / "condense_plan.json").read_text())
        for file in ("model.safetensors", "config.json", *CODE[name]):
            assert (root / "again" / name / file).read_bytes() == (root / name / file).read_bytes(), (name, file)
        module, *rest = found[f"{name} of the hub"]
        with_classes = "modeling_deepseek" if name == "deepseek" else "modeling_cdmoe"
        assert module == f"transformers_modules.me.{name}.{COMMIT}.{with_classes}"
        assert rest == [f"CDMoE{prefix}ForCausalLM", True]
        assert found[f"{name} unknown"] is False
    for name in ("qwen2_moe", "deepseek"):
        assert found[f"{name} head"][1:] == [f"CDMoE{NAMES[name]}ForSequenceClassification", [1, 3]]


@pytest.mark.slow
def test_with_neither(root: Path, tmp_path: Path) -> None:
    answers = answer_of(WITHOUT_PACKAGE + OPEN + REFUSED, root, tmp_path)
    assert len(answers) == 12
    for case, said in answers.items():
        assert said.startswith("ValueError"), case
        assert ("cdmoe_qwen2_moe" if "without" in case else "trust_remote_code=True") in said, case


@pytest.mark.parametrize("name", NAMES)
def test_the_code_stands_alone(name: str, root: Path) -> None:
    """It imports torch, transformers and what lies beside it, is short, and touches no files."""
    assert {path.name for path in (root / name).glob("*.py")} == CODE[name]
    texts = {file: (root / name / file).read_text() for file in CODE[name]}
    assert sum(len(texts[file].splitlines()) for file in ("modeling_cdmoe.py", "layers_cdmoe.py")) <= 450
    for text in texts.values():
        nodes = list(ast.walk(ast.parse(text)))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {"." * node.level + str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        beside = {module for module in imported if module.startswith(".")}
        assert {f"{module[1:]}.py" for module in beside} < CODE[name]
        roots = {module.partition(".")[0] for module in imported - beside}
        assert roots - set(sys.stdlib_module_names) <= {"torch", "transformers"}
        assert not roots & {"ctypes", "fcntl", "glob", "io", "os", "pathlib", "shutil", "subprocess", "tempfile"}
        assert not {"open", "exec", "eval"} & {node.id for node in nodes if isinstance(node, ast.Name)}


# --- checkpoints that are not what they say ---

LAYER = "condense_config.condensed_layers.3"
TRIMMED = {"form": "trim_layer", "omitted": []}
ACTIVATIONS = ("0.mlp.act_fn", "2.mlp.experts.act_fn")  # without weights that would be missed
SENSELESS = [("model_type", f"cdmoe_{name}") for name in ("magic", "", "qwen3_moe", "llama", "deepseek")]
SENSELESS += [("condense_config", value) for value in (MISSING, None, "greedy", [1], {})]
SENSELESS += [("condense_config.condensed_layers", value) for value in (MISSING, {}, [1], {"3": "wide"})]
SENSELESS += [(f"{LAYER}.intermediate_size", value) for value in (40, -1, "56", MISSING)]
SENSELESS += [(f"{LAYER}.module", value) for value in ("layers.9.mlp", "layers.3.router", "layers.0.self_attn", None)]
SENSELESS += [("condense_config.condensed_layers.0", {**TRIMMED, "module": f"layers.{name}"}) for name in ACTIVATIONS]
SENSELESS += [(f"{LAYER}.omitted", value) for value in (["input_layernorm"], ["shared_mlp"], MISSING)]
SENSELESS += [(f"{LAYER}.hidden_act", "magic"), (f"{LAYER}.bias", True), (f"{LAYER}.shared_expert_gate", False)]
SENSELESS += [(f"{LAYER}.shared_intermediate_size", 1000), (LAYER, MISSING)]
GATE = "model.layers.3.mlp.gate_proj.weight"
TENSORS = {GATE: None, "model.norm.weight": None, "lm_head.weight": None, "model.layers.3.mlp.gate.weight": (8, 32)}


@pytest.fixture
def damaged(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "qwen2_moe", tmp_path / "damaged"))


@pytest.mark.parametrize(("place", "value"), SENSELESS)
def test_wrong_config(place: str, value: Any, damaged: Path) -> None:
    edit_config(damaged, "auto_map", MISSING)
    edit_config(damaged, place, value)
    words = r"condense_config|model type|model_type|lacks \d+ weights|have no place|ignore_mismatched_sizes"
    with pytest.raises((ValueError, RuntimeError), match=words):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize(("name", "shape"), [*TENSORS.items(), (GATE, (40, 32)), ("lm_head.weight", (100, 32))])
def test_wrong_tensors(name: str, shape: tuple[int, ...] | None, ignore: bool, damaged: Path) -> None:
    weights = load_file(damaged / "model.safetensors")
    weights[name] = torch.zeros(shape or 1)
    if shape is None:
        del weights[name]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=rf"{name}|set `ignore_mismatched_sizes` to `False`"):
        AutoModelForCausalLM.from_pretrained(damaged, ignore_mismatched_sizes=ignore)


def test_a_sparse_checkpoint_is_not_condensed(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    condensed = condensed_model_class(Qwen2MoeForCausalLM)
    with pytest.raises(ValueError, match=r"condense_config.*not condensed"):
        condensed.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"condense_config.*not condensed"):
        condensed(condensed.config_class.from_pretrained(tmp_path))
