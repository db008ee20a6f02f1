"""A checkpoint that version 0.1 saved opens and is saved again, with this package and without it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cdmoe_plugin import CondensePlan
from tests.helpers.own_process import WITHOUT_PACKAGE, answer_of

OLD = Path(__file__).parents[1] / "data" / "checkpoint_0_1"
# Opens checkpoints by the code beside their weights, saves them again, and opens that.
REMOTE_CODE = """
import json
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
root = Path(sys.argv[1])
ids, logits, modules = load_file(root / "old" / "expected.safetensors")["input_ids"], {}, {}
for name in ("old", "new", "old again", "new again"):
    model = AutoModelForCausalLM.from_pretrained(root / name, trust_remote_code=True)
    logits[name] = model(ids).logits.detach()
    modules[name] = type(model).__module__.partition(".")[0]
    if not name.endswith("again"):
        model.save_pretrained(root / f"{name} again")
save_file(logits, root / "logits.safetensors")
print("\\n" + json.dumps(modules))
"""


@pytest.mark.slow
def test_opened_with_and_without_the_package(tmp_path: Path) -> None:
    (tmp_path / "old").symlink_to(OLD)
    expected = load_file(OLD / "expected.safetensors")

    def open_and_compare(name: str) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(model).__module__ == "cdmoe_plugin.model.classes"
        torch.testing.assert_close(model(expected["input_ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-6)
        assert model.condense_plan == CondensePlan.load(tmp_path / name) == CondensePlan.load(OLD)
        return model

    shutil.copytree(OLD, tmp_path / "new")
    open_and_compare("old").save_pretrained(tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").glob("*.py")} == {"modeling_cdmoe.py", "layers_cdmoe.py"}
    modules = answer_of(WITHOUT_PACKAGE + REMOTE_CODE, tmp_path, tmp_path)
    assert set(modules.values()) == {"transformers_modules"}
    for name, logits in load_file(tmp_path / "logits.safetensors").items():
        torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-6, msg=name)
    for name in modules:
        open_and_compare(name)
    assert not (tmp_path / "new again" / "condense_plan.json").exists()  # the plan came from config.json
