"""Bases with code of their own: the condensed checkpoint brings it along, and opens in a process of its own."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    dynamic_module_utils,
)

from cdmoe_plugin import CondenseConfig, apply_plan, condense_pretrained, export_stock, search_plan
from tests.helpers.own_code import LAYOUTS, SEVERAL, write_base
from tests.helpers.own_process import WITHOUT_PACKAGE, answer_of
from tests.helpers.plans import some_plan
from tests.helpers.recovery import word_tokenizer
from tests.helpers.tiny_models import tiny_model

IDS = torch.tensor([[(7 * i + 3) % 120 + 4 for i in range(12)]])
CONFIG = CondenseConfig(num_layers=2, num_experts=2)
OPEN = """
import json
import torch
from transformers import AutoModel, AutoModelForCausalLM
found = {}
for name in ("several", "one", "again", "part"):
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True)
    with torch.no_grad():
        logits = model(torch.tensor([[(7 * i + 3) % 120 + 4 for i in range(12)]])).logits
    found[name] = [type(model).__name__, logits.double().sum().item(), sorted(model.condense_plan)[:1]]
decoder = AutoModel.from_pretrained(f"{sys.argv[1]}/several", trust_remote_code=True)
found["decoder"] = type(decoder).__name__
model.save_pretrained(f"{sys.argv[1]}/saved without")
print("\\n" + json.dumps(found))
"""


@pytest.fixture(autouse=True, scope="module")
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache of code is a folder of this module's own, of which nothing stays imported."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        monkeypatch.setattr(
            sys, "path", [place for place in sys.path if not Path(place, "transformers_modules").exists()]
        )
        forget()
        yield
    forget()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, own_modules: Any) -> Path:
    root = tmp_path_factory.mktemp("own code")
    for i, (name, files) in enumerate(LAYOUTS.items()):
        write_base(root / "base" / name, files, scale=2.0 + i)
    return root


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def opened(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)


def test_the_checkpoint_opens(root: Path) -> None:
    """In this process and in one without the package, after it was saved again and when only a part was read."""
    expected = {}
    for name in LAYOUTS:  # both have classes of the same names
        model = condense_pretrained(root / "base" / name, CONFIG, calibration=IDS, trust_remote_code=True)
        assert type(model).__name__ == "CDMoEOwnForCausalLM"
        model.save_pretrained(root / name)
        again = opened(root / name)
        assert torch.equal(logits(again), logits(model))
        expected[name] = logits(model).double().sum().item()
    again.save_pretrained(root / "again")
    assert torch.equal(logits(opened(root / "again")), logits(again))
    plan = model.condense_plan
    part = condense_pretrained(root / "base" / name, plan=plan, trust_remote_code=True, offload_folder=root / "offload")
    part.save_pretrained(root / "part")
    expected |= {"again": expected[name], "part": expected[name]}

    config = json.loads((root / "several" / "config.json").read_text())
    assert config["model_type"] == "cdmoe_own_moe"
    names = {path.name for path in (root / "several").glob("*.py")}
    assert names == {"modeling_cdmoe.py", "layers_cdmoe.py", "modeling_cdmoe_own.py", *SEVERAL}
    for name, text in SEVERAL.items():
        assert (root / "several" / name).read_text() == text
    found = answer_of(WITHOUT_PACKAGE + OPEN, root, root)
    assert found.pop("decoder") == "CDMoEOwnModel"
    assert {name: values[0] for name, values in found.items()} == dict.fromkeys(expected, "CDMoEOwnForCausalLM")
    assert {name: values[1] for name, values in found.items()} == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(logits(opened(root / "saved without")), logits(part), atol=1e-5)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(root / "several", trust_remote_code=False)


def test_an_exported_one_opens(root: Path, tmp_path: Path) -> None:
    """As does one with layers dropped: both are of the base's own class."""
    base = root / "base" / "several"
    model = condense_pretrained(base, CONFIG, calibration=IDS, trust_remote_code=True)
    export_stock(model, tmp_path / "stock", approximate=True, calibration=IDS)
    assert type(opened(tmp_path / "stock")).__name__ == "OwnForCausalLM"
    config = CondenseConfig(layers=[1], form="trim_block")
    trimmed = condense_pretrained(base, config, calibration=IDS, trust_remote_code=True)
    trimmed.save_pretrained(tmp_path / "trimmed")
    assert torch.equal(logits(opened(tmp_path / "trimmed")), logits(trimmed))


def test_a_condensed_one_is_not_condensed_again(root: Path, tmp_path: Path) -> None:
    model = apply_plan(opened(root / "base" / "one"), some_plan([1]))
    model.save_pretrained(tmp_path / "condensed")
    with pytest.raises(ValueError, match=r"condensed already \(decoder layers \[1\]\)"):
        condense_pretrained(tmp_path / "condensed", CONFIG, calibration=IDS, trust_remote_code=True)
    with pytest.raises(ValueError, match="condensed already"):
        search_plan(opened(tmp_path / "condensed"), CONFIG, calibration=IDS)


def test_code_with_a_model_type_of_transformers(tmp_path: Path) -> None:
    """As of DeepSeek-V2-Lite on the hub: transformers' own class is used unless remote code is asked for."""
    files = {name: text.replace('"own_moe"', '"qwen2_moe"') for name, text in SEVERAL.items()}
    write_base(tmp_path / "base", files, scale=1.0, model_type="qwen2_moe")
    model = condense_pretrained(tmp_path / "base", CONFIG, calibration=IDS)
    assert type(model).__name__ == "CDMoEQwen2MoeForCausalLM"
    model.save_pretrained(tmp_path / "condensed")
    assert json.loads((tmp_path / "condensed" / "config.json").read_text())["auto_map"] == {
        **model.config.auto_map, "AutoConfig": "modeling_cdmoe.CDMoEQwen2MoeConfig"
    }  # fmt: skip
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "condensed")), logits(model))
    for attempt in (
        lambda: condense_pretrained(tmp_path / "base", CONFIG, calibration=IDS, trust_remote_code=True),
        lambda: search_plan(opened(tmp_path / "base"), CONFIG, calibration=IDS),
        lambda: apply_plan(opened(tmp_path / "base"), some_plan([1])),
    ):
        with pytest.raises(
            ValueError, match=r"'qwen2_moe', is one of transformers' own.*without `trust_remote_code=True`"
        ):
            attempt()


def test_code_that_can_not_be_saved(root: Path, tmp_path: Path) -> None:
    write_base(
        tmp_path / "base",
        {
            **SEVERAL,
            "modeling_cdmoe.py": SEVERAL["scaling_own.py"],
            "layers_own.py": "from .modeling_cdmoe import scaled\n",
        },
    )
    with pytest.raises(ValueError, match=r"has a file named modeling_cdmoe.py, as condensed checkpoints have"):
        condense_pretrained(tmp_path / "base", CONFIG, calibration=IDS, trust_remote_code=True)
    model = opened(write_base(tmp_path / "second", SEVERAL))
    Path(str(importlib.import_module(type(model).__module__).__file__)).unlink()
    with pytest.raises(ValueError, match=r"code of OwnForCausalLM .* can't be read: .*modeling_own.py"):
        search_plan(model, CONFIG, calibration=IDS)


def test_code_of_the_config_or_the_tokenizer_alone(tmp_path: Path) -> None:
    """The model is of a class of transformers, and so is the condensed one."""
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "configuration_own.py").write_text(
        "from transformers import Qwen2MoeConfig as Base\n\n\nclass Qwen2MoeConfig(Base):\n    pass\n"
    )
    (tmp_path / "base" / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizerFast(PreTrainedTokenizerFast):\n"
        "    pass\n"
    )
    config["auto_map"] = {
        "AutoConfig": "configuration_own.Qwen2MoeConfig",
        "AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"],
    }
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    texts = ["w1 w2 w3", "w4 w5 w6 w7"]
    model = condense_pretrained(tmp_path / "base", CONFIG, calibration=texts, trust_remote_code=True)
    model.save_pretrained(tmp_path / "condensed")
    AutoTokenizer.from_pretrained(tmp_path / "base", trust_remote_code=True).save_pretrained(tmp_path / "condensed")
    for trust in (True, False):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "condensed", trust_remote_code=trust)
        assert torch.equal(logits(again), logits(model))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "condensed", trust_remote_code=True)
    assert tokenizer(texts)["input_ids"] == word_tokenizer()(texts)["input_ids"]


class LocalConfig(Qwen2MoeConfig):
    """A config of a class that a user registers."""

    model_type = "local_moe"


class LocalForCausalLM(Qwen2MoeForCausalLM):
    """A model of a class that a user registers."""

    config_class = LocalConfig


def test_classes_that_a_user_registers(tmp_path: Path) -> None:
    """Their file stays where it is: the checkpoint opens where they are registered."""
    AutoConfig.register("local_moe", LocalConfig, exist_ok=True)
    AutoModelForCausalLM.register(LocalConfig, LocalForCausalLM, exist_ok=True)
    values = tiny_model("qwen2_moe").config.to_dict()
    model = LocalForCausalLM(LocalConfig(**{k: v for k, v in values.items() if k != "model_type"}))
    apply_plan(model.eval(), some_plan([1]))
    model.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert {path.name for path in tmp_path.glob("*.py")} == {"modeling_cdmoe.py", "layers_cdmoe.py"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
