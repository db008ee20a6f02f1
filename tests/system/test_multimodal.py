"""Condensed multimodal checkpoints open as remote code without the package, with the processor beside them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from cdmoe_plugin import CondensedLayer, CondensePlan, apply_plan
from tests.helpers.own_process import WITHOUT_PACKAGE, answer_of
from tests.helpers.wrappers import image_inputs, tiny_wrapper

TYPES = ["qwen3_5_moe", "qwen3_vl_moe", "gemma4", "llama4", "glm4v_moe"]
AS_REMOTE_CODE = """
import json
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
root, found = Path(sys.argv[1]), {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    inputs = load_file(root / f"{folder.name}.safetensors")
    expected = inputs.pop("expected")
    found[folder.name] = []
    for opener in (AutoModelForImageTextToText, AutoModelForCausalLM):
        model = opener.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            same = torch.equal(model(**inputs).logits, expected)
        found[folder.name].append([type(model).__name__, type(model.config).__name__, same])
print("\\n" + json.dumps(found))
"""


def test_multimodal_checkpoints_as_remote_code(tmp_path: Path) -> None:
    root, place = tmp_path / "root", tmp_path / "place"
    root.mkdir()
    place.mkdir()
    names = {}
    for name in TYPES:
        model = tiny_wrapper(name)
        names[name] = type(model).__name__, type(model.config).__name__
        apply_plan(model, CondensePlan([CondensedLayer(3, [1, 2], [0.5, 0.25])]))
        model.save_pretrained(root / name)
        inputs = image_inputs(name)
        with torch.no_grad():
            save_file({**inputs, "expected": model(**inputs).logits}, root / f"{name}.safetensors")
    found = answer_of(WITHOUT_PACKAGE + AS_REMOTE_CODE, root, place)
    assert found == {name: 2 * [[f"CDMoE{model}", f"CDMoE{config}", True]] for name, (model, config) in names.items()}
