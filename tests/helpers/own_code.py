"""Sparse checkpoints with code of their own, in one or several files, as on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.tiny_models import tiny_model

CONFIG = """
from transformers import Qwen2MoeConfig


class OwnConfig(Qwen2MoeConfig):
    model_type = "own_moe"

    def __init__(self, scale=1.0, **kwargs):
        self.scale = scale
        super().__init__(**kwargs)
"""
SCALING = """
def scaled(logits, config):
    return logits * config.scale
"""
MODEL = """
from transformers import Qwen2MoeForCausalLM, Qwen2MoeModel
{imports}

class OwnModel(Qwen2MoeModel):
    config_class = OwnConfig


class OwnForCausalLM(Qwen2MoeForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = scaled(output.logits, self.config)
        return output
"""
IMPORTS = "from .configuration_own import OwnConfig\nfrom .layers_own import scaled\n"
SEVERAL = {
    "configuration_own.py": CONFIG,
    "scaling_own.py": SCALING,
    "layers_own.py": "from .scaling_own import scaled\n",
    "modeling_own.py": MODEL.format(imports=IMPORTS),
}
ONE = {"modeling_own.py": CONFIG + SCALING + MODEL.format(imports="")}
LAYOUTS = {"several": SEVERAL, "one": ONE}


def write_base(folder: Path, files: dict[str, str], scale: float = 2.0, **fields: Any) -> Path:
    """Write a checkpoint whose classes are defined in files beside its weights."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    config_file = "configuration_own" if "configuration_own.py" in files else "modeling_own"
    auto_map = {"AutoConfig": f"{config_file}.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    auto_map["AutoModel"] = "modeling_own.OwnModel"
    values = {**tiny_model("qwen2_moe").config.to_dict(), "model_type": "own_moe", "auto_map": auto_map}
    values |= {"architectures": ["OwnForCausalLM"], "scale": scale, **fields}
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))  # as on the hub
    return folder
