"""The text model of a multimodal checkpoint, condensed and saved alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from cdmoe_plugin import (
    CondenseConfig,
    CondensedLayer,
    CondensePlan,
    apply_plan,
    condense_pretrained,
)
from cdmoe_plugin.blocks import UnsupportedModelError
from cdmoe_plugin.estimate import dry_run
from cdmoe_plugin.export.check import check_export
from cdmoe_plugin.loading.auto import text_config
from tests.helpers.published import read
from tests.helpers.tiny_models import random_ids
from tests.helpers.wrappers import (
    WRAPPERS,
    has_text_model,
    logits,
    tiny_wrapper,
    wrapper_config,
)

IDS = random_ids(4, 14, vocab=110)
PLAN = CondensePlan([CondensedLayer(3, [1, 2], [0.5, 0.25])])
# Named "model.language_model" and "language_model" on disk, and in a way of its own.
TEXT_ONLY = ["qwen3_5_moe", "gemma4", "llama4", "llava", "inkling2", "kimi_k25", "nemotron_h_omni"]


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_text_models_of_their_own(model_type: str) -> None:
    if has_text_model(model_type):
        assert text_config("folder", wrapper_config(model_type)).model_type == WRAPPERS[model_type].text
    else:
        with pytest.raises(UnsupportedModelError, match="as a model of its own"):
            text_config("folder", wrapper_config(model_type))


@pytest.mark.parametrize("model_type", TEXT_ONLY)
def test_text_only(model_type: str, tmp_path: Path) -> None:
    sparse, inputs = tiny_wrapper(model_type), {"input_ids": torch.tensor(IDS[:1])}
    sparse.save_pretrained(tmp_path / "base")
    expected = logits(apply_plan(sparse, PLAN), **inputs)
    for name, kwargs in {"plan": {}, "disk": {"offload_folder": tmp_path / "offload"}}.items():
        model = condense_pretrained(tmp_path / "base", plan=PLAN, text_only=True, **kwargs)
        assert model.config.get_text_config() is model.config
        assert type(model.config).model_type == f"cdmoe_{WRAPPERS[model_type].text}"
        torch.testing.assert_close(logits(model, **inputs), expected)
        model.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(again) is type(model)
        torch.testing.assert_close(logits(again, **inputs), expected)
        assert not any("language_model" in name or "vis" in name for name in read(tmp_path / name))
        card = (tmp_path / name / "README.md").read_text()
        assert "only the text model of the multimodal base model" in card
        assert "--text_only true" in card
    found = condense_pretrained(tmp_path / "base", CondenseConfig(1, 2, layers=[3]), calibration=IDS, text_only=True)
    assert found.condense_plan.model.model_type == WRAPPERS[model_type].text


def test_text_only_says_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_wrapper("qwen3_5_moe").save_pretrained(tmp_path)
    for name in ("transformers", "cdmoe_plugin"):
        logging.getLogger(name).propagate = True
    transformers.utils.logging.warning_once.cache_clear()
    condense_pretrained(tmp_path, plan=PLAN, text_only=True)
    assert "only the text model (qwen3_5_moe_text) is condensed and saved" in caplog.text


def test_text_only_where_it_does_not_apply(tmp_path: Path) -> None:
    tiny_wrapper("qwen3_vl_moe").save_pretrained(tmp_path / "qwen")
    with pytest.raises(UnsupportedModelError, match=r"`text_only` does not work for model type 'qwen3_vl_moe'"):
        condense_pretrained(tmp_path / "qwen", plan=PLAN, text_only=True)
    text = condense_pretrained(_saved(tmp_path / "llama4", "llama4"), plan=PLAN, text_only=True)
    config = text.config.__class__.__mro__[1](**{k: v for k, v in text.config.to_dict().items() if k != "model_type"})
    config.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="is a text model already"):
        condense_pretrained(tmp_path / "text", plan=PLAN, text_only=True)
    with pytest.raises(ValueError, match="not to a loaded model"):
        condense_pretrained(tiny_wrapper("llama4"), plan=PLAN, text_only=True)


def _saved(folder: Path, model_type: str) -> Path:
    tiny_wrapper(model_type).save_pretrained(folder)
    return folder


def test_sizes_of_the_whole_and_of_the_text_model(tmp_path: Path) -> None:
    model = tiny_wrapper("gemma4")
    model.save_pretrained(tmp_path)
    whole, text = (dry_run(tmp_path, PLAN, text_only=alone) for alone in (False, True))
    assert f"{model.num_parameters():,}" in whole
    assert f"{model.num_parameters():,}" not in text
    with pytest.raises(UnsupportedModelError, match="part of a larger model"):
        check_export(tmp_path, PLAN)


def test_a_plan_for_the_text_model_fits_the_whole(tmp_path: Path) -> None:
    folder = _saved(tmp_path, "qwen3_5_moe")
    config = CondenseConfig(1, 2)
    plan = condense_pretrained(folder, config, calibration=IDS, text_only=True).condense_plan
    whole = condense_pretrained(folder, plan=plan)
    assert type(whole.config).model_type == "cdmoe_qwen3_5_moe"
    assert condense_pretrained(folder, config, calibration=IDS).condense_plan.layers == plan.layers
