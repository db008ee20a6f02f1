"""Condense adapters in processes that have only imported the package, and in one that has not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from cdmoe_plugin import CondenseAdapterConfig
from tests.helpers.own_process import WITHOUT_PACKAGE, answer_of
from tests.helpers.plans import some_plan
from tests.helpers.programs import Programs
from tests.helpers.tiny_models import tiny_model

IDS = [[5, 17, 3, 99, 42]]
PROGRAM = f"""
import json, sys
import cdmoe_plugin
assert "peft" not in sys.modules
import torch
from transformers import AutoModelForCausalLM
assert "cdmoe_plugin.adapter" not in sys.modules
from peft import AutoPeftModelForCausalLM, PeftModel
with torch.no_grad():
    answers = []
    for model in (
        AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/adapter"),
        AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + "/adapter"),
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base"), sys.argv[1] + "/adapter", adapter_name="mine"
        ),
    ):
        answers.append(model(input_ids=torch.tensor({IDS})).logits.tolist())
print(json.dumps(answers))
"""
FAILING = """
import json, sys
from peft import PeftConfig
try:
    PeftConfig.from_pretrained(sys.argv[1] + "/adapter")
except KeyError as error:
    print(json.dumps(str(error)))
"""
# The method is the first to be imported, and brings PEFT.
METHOD_FIRST = """
import json
from cdmoe_plugin import CondenseAdapterConfig
from peft import PeftType
print(json.dumps(PeftType("CDMOE").value))
"""

# As many rows per step in one process as in two together.
TRAINING = """
import os, sys
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from cdmoe_plugin import CondenseAdapterConfig
from tests.helpers.plans import some_plan
from tests.helpers.programs import Programs
from tests.helpers.recovery import lm_rows, word_tokenizer
from tests.helpers.tiny_models import tiny_model
processes = int(os.environ.get("WORLD_SIZE", "1"))
quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}
trainer = SFTTrainer(
    tiny_model("qwen2_moe", max_positions=256),
    args=SFTConfig(
        sys.argv[1], max_steps=3, learning_rate=1e-2, per_device_train_batch_size=4 // processes, max_length=32, **quiet
    ),
    train_dataset=Dataset.from_list(lm_rows()),
    processing_class=word_tokenizer(),
    peft_config=CondenseAdapterConfig(plan=some_plan([1, 2, 3]), task_type="CAUSAL_LM"),
)
assert trainer.accelerator.num_processes == processes
trainer.train()
trainer.save_model()
"""


def write(folder: Path, model: PreTrainedModel) -> list[list[list[float]]]:
    """Writes a base model and an adapter; returns the logits that both should give."""
    model.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    adapted = get_peft_model(model, CondenseAdapterConfig(plan=some_plan([1, 3]), task_type="CAUSAL_LM"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data *= 1.25
    adapted.eval().save_pretrained(folder / "adapter")
    with torch.no_grad():
        return adapted(input_ids=torch.tensor(IDS)).logits.tolist()


@pytest.mark.parametrize("model_type", ["qwen2_moe", "granitemoeshared", "gemma4_text"])
def test_opened_elsewhere(model_type: str, tmp_path: Path) -> None:
    expected = torch.tensor(write(tmp_path, tiny_model(model_type)))
    for answer in answer_of(PROGRAM, tmp_path, tmp_path):
        # Not bit for bit: how products round may depend on where a mapped file puts the weights in memory.
        torch.testing.assert_close(torch.tensor(answer), expected, rtol=1e-5, atol=1e-5)


def test_without_the_package(tmp_path: Path) -> None:
    write(tmp_path, tiny_model("qwen2_moe"))
    assert answer_of(WITHOUT_PACKAGE + FAILING, tmp_path, tmp_path) == "'CDMOE'"
    assert "`KeyError: 'CDMOE'`" in (tmp_path / "adapter" / "README.md").read_text()


def test_the_method_before_peft(tmp_path: Path) -> None:
    assert answer_of(METHOD_FIRST, tmp_path, tmp_path) == "CDMOE"


@pytest.mark.slow
def test_trained_by_two_processes(tmp_path: Path, programs: Programs) -> None:
    (tmp_path / "program.py").write_text(TRAINING)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    for name, start in (("one", []), ("two", launcher)):
        command = [programs.python, *start, str(tmp_path / "program.py"), str(tmp_path / name)]
        done = subprocess.run(command, env=programs.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
