"""Checkpoints that are published quantised, against plain ones whose weights tests/helpers/published.py works out."""

from __future__ import annotations

import json
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
)

from cdmoe_plugin import CondenseConfig, apply_plan, condense_pretrained, search_plan
from cdmoe_plugin.estimate import dry_run
from cdmoe_plugin.loading.packed import Packed
from tests.helpers import published
from tests.helpers.checkpoints import Reads
from tests.helpers.own_process import answer_of
from tests.helpers.plans import some_plan
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import random_ids, tiny_model

IDS = random_ids(5)
CONFIG = CondenseConfig(num_layers=1, num_experts=2, batch_size=2)


@pytest.fixture(scope="module", params=list(published.QUANTISED))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> published.Pair:
    """A quantised checkpoint, and a plain one with the same weights."""
    return published.QUANTISED[request.param](tmp_path_factory.mktemp(request.param) / "checkpoint")


def assert_same(model: PreTrainedModel, plain: PreTrainedModel, folder: Path) -> None:
    """Two models have the same weights, are saved under the same names, and nothing tells of a quantisation."""
    assert model.dtype == plain.dtype == torch.bfloat16
    for name, each in (("one", model), ("other", plain)):
        each.save_pretrained(folder / name)
    assert published.read(folder / "one").keys() == published.read(folder / "other").keys()
    config, other = (published.config_of(folder / name) for name in ("one", "other"))
    assert not differing_fields(config, other)
    opened = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("one", "other")]
    assert not differing(*map(state, opened))
    assert not {"hf_quantizer", "quantization_method", "is_loaded_in_4bit"} & vars(model).keys()


def differing_fields(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    here = {"condense_config", "_name_or_path", "transformers_version"}
    assert one["condense_config"]["plan"] == other["condense_config"]["plan"]
    return [name for name in {*one, *other} - here if one.get(name) != other.get(name)]


def test_quantised_weights_become_what_they_stand_for(
    pair: published.Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantised, plain = pair
    expected = condense_pretrained(plain, CONFIG, calibration=IDS)
    assert "dequantised" not in caplog.text
    model = condense_pretrained(quantised, CONFIG, calibration=IDS)
    assert caplog.text.count("they are dequantised to bfloat16 while they are read") == 1
    assert model.condense_plan == expected.condense_plan
    assert_same(model, expected, tmp_path)
    part = condense_pretrained(quantised, plan=expected.condense_plan)
    assert not differing(state(part), state(expected))


def test_from_disk(pair: published.Pair, tmp_path: Path) -> None:
    quantised, plain = pair
    expected = condense_pretrained(plain, CONFIG, calibration=IDS)
    model = condense_pretrained(quantised, CONFIG, calibration=IDS, offload_folder=str(tmp_path / "offload"))
    assert {p.device.type for name, p in model.named_parameters() if ".layers." in name} == {"meta"}
    assert model.condense_plan.layers[0].experts == expected.condense_plan.layers[0].experts
    again = condense_pretrained(
        quantised, plan=expected.condense_plan, offload_folder=str(tmp_path / "again"), dtype="bfloat16"
    )
    assert_same(again, expected, tmp_path)


def test_estimates_are_those_of_plain_weights(pair: published.Pair) -> None:
    quantised, plain = pair
    assert dry_run(quantised, CONFIG) == dry_run(plain, CONFIG)


def test_another_dtype(tmp_path: Path) -> None:
    quantised, plain = published.qwen_fp8(tmp_path / "checkpoint")
    one, other = (condense_pretrained(path, plan=some_plan([1]), dtype="float32") for path in (quantised, plain))
    assert one.dtype == torch.float32
    # More digits than bfloat16 keeps: weights are dequantised to this dtype.
    mine, its = (model.model.layers[0].self_attn.q_proj.weight for model in (one, other))
    assert mine.ne(its).any()
    torch.testing.assert_close(mine, its, rtol=0.01, atol=0)


@pytest.mark.parametrize("layout", ["deepseek_v3", "gpt_oss"])
def test_only_what_is_kept_is_read(layout: str, tmp_path: Path, reads: Reads) -> None:
    quantised, _ = published.QUANTISED[layout](tmp_path / "checkpoint")
    plan = some_plan([2])
    condense_pretrained(quantised, plan=plan)
    kept = set(plan.layers[0].experts)
    of_experts = [(key, index) for key, index, _ in reads if "layers.2.mlp.experts." in key]
    if layout == "deepseek_v3":
        assert {int(key.split(".")[5]) for key, _ in of_experts} == kept
        assert sum(key.endswith("_scale_inv") for key, _ in of_experts) == len(of_experts) / 2
    else:
        assert {index.start for _, index in of_experts if isinstance(index, slice)} == kept
        assert all(isinstance(index, slice) for _, index in of_experts)
    assert not any("layers.4." in key for key, *_ in reads)


def test_one_layer_of_dequantised_weights_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the search, in a refit and while saving."""
    quantised, _ = published.deepseek_v3(tmp_path / "checkpoint", block=16)
    now = most = 0
    unpack = Packed._unpacked

    def forget(size: int) -> None:
        nonlocal now
        now -= size

    def counting(self: Packed) -> torch.Tensor:
        nonlocal now, most
        tensor = unpack(self)
        now += tensor.nbytes
        most = max(most, now)
        weakref.finalize(tensor, forget, tensor.nbytes)
        return tensor

    monkeypatch.setattr(Packed, "_unpacked", counting)
    config = CondenseConfig(num_layers=1, num_experts=2, batch_size=2, refit="down_proj")
    model = condense_pretrained(quantised, config, calibration=IDS, offload_folder=str(tmp_path / "offload"))
    layer = max(sum(2 * p.numel() for p in layer.parameters()) for layer in model.model.layers)
    assert 0 < most <= layer
    most = 0
    model.save_pretrained(tmp_path / "saved")
    assert 0 < most <= layer / 8  # one matrix after the other


LOADED = {"gpt_oss": Mxfp4Config, "qwen_fp8": FineGrainedFP8Config}


@pytest.mark.parametrize("form", ["condense", "trim_block"])
@pytest.mark.parametrize("layout", [*LOADED, "nf4"])
def test_models_that_were_loaded_dequantised(layout: str, form: str, tmp_path: Path) -> None:
    quantised, plain = published.QUANTISED[layout](tmp_path / "checkpoint")
    if layout == "nf4":
        model = AutoModelForCausalLM.from_pretrained(quantised).dequantize(dtype=torch.bfloat16)
    else:
        settings = LOADED[layout](dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(quantised, quantization_config=settings, dtype=torch.bfloat16)
    plan = some_plan([1]) if form == "condense" else some_plan([1]).as_trimming(form)
    expected = apply_plan(AutoModelForCausalLM.from_pretrained(plain), plan)
    model = apply_plan(model, plan)
    assert not differing(state(model), state(expected))
    model.save_pretrained(tmp_path / "saved")
    expected.save_pretrained(tmp_path / "plain")
    assert published.read(tmp_path / "saved").keys() == published.read(tmp_path / "plain").keys()
    assert "quantization_config" not in published.config_of(tmp_path / "saved")
    assert not differing(state(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), state(expected))


def test_a_quantisation_that_is_passed(tmp_path: Path) -> None:
    quantised, plain = published.qwen_fp8(tmp_path / "checkpoint")
    plan = some_plan([1])
    expected = state(condense_pretrained(plain, plan=plan))
    for given in (FineGrainedFP8Config(dequantize=True), {"quant_method": "fp8", "dequantize": True}):
        assert not differing(state(condense_pretrained(quantised, plan=plan, quantization_config=given)), expected)
        assert not differing(state(condense_pretrained(plain, plan=plan, quantization_config=given)), expected)
    with pytest.raises(ValueError, match=r"does not dequantise.*`dequantize=True`") as refused:
        condense_pretrained(quantised, plan=plan, quantization_config=FineGrainedFP8Config())
    assert "condense first" not in str(refused.value)
    with pytest.raises(ValueError, match=r"is for mxfp4, but the weights of .* are stored quantised by fp8"):
        condense_pretrained(quantised, plan=plan, quantization_config=Mxfp4Config(dequantize=True))
    with pytest.raises(ValueError, match="condense first"):
        condense_pretrained(plain, plan=plan, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_models_that_are_still_quantised(tmp_path: Path) -> None:
    quantised, _ = published.QUANTISED["nf4"](tmp_path / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(quantised)
    for verb in (partial(search_plan, model, CONFIG, calibration=IDS), partial(apply_plan, model, some_plan([1]))):
        with pytest.raises(ValueError, match=r"give the checkpoint's path|Give the checkpoint's path") as refused:
            verb()
        assert "condense first" not in str(refused.value)


def test_codes_without_scales_are_no_weights(tmp_path: Path) -> None:
    quantised, _ = published.qwen_fp8(tmp_path / "checkpoint")
    tensors = published.read(quantised)
    lost = next(key for key in tensors if "layers.1.mlp.experts.3" in key and key.endswith("_scale_inv"))
    without = {key: tensor for key, tensor in tensors.items() if key != lost}
    published.write(quantised, without, published.config_of(quantised))
    with pytest.raises(
        ValueError, match=f"1 quantised weights without scales, such as {lost.removesuffix('_scale_inv')}"
    ):
        condense_pretrained(quantised, CONFIG, calibration=IDS)


def test_stacked_experts_in_fp8(tmp_path: Path) -> None:
    """As transformers' own FP8 models are saved, if names are not reverted."""
    published.plain(tmp_path / "one", tiny_model("granitemoe", dtype=torch.bfloat16))
    tensors, found, meaning = published.read(tmp_path / "one"), {}, {}
    for key, tensor in tensors.items():
        found[key] = meaning[key] = tensor
        if tensor.ndim == 3:
            parts = [published.to_fp8(matrix, (16, 16)) for matrix in tensor]
            found[key], found[f"{key}_scale_inv"] = (torch.stack(each) for each in zip(*parts, strict=True))
            meaning[key] = torch.stack([published.from_fp8(*part, (16, 16)) for part in parts]).bfloat16()
    config = published.config_of(tmp_path / "one")
    quantised = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    published.write(tmp_path / "one", found, config | {"quantization_config": quantised})
    published.write(tmp_path / "other", meaning, config)
    one, other = (condense_pretrained(tmp_path / name, plan=some_plan([1])) for name in ("one", "other"))
    assert not differing(state(one), state(other))


def test_the_command_that_makes_a_dequantised_copy(tmp_path: Path) -> None:
    """Of the refusals: transformers' own saving, under names of the model."""
    quantised, plain = published.gpt_oss(tmp_path / "checkpoint")
    settings = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": "bfloat16"}
    model = AutoModelForCausalLM.from_pretrained(quantised, **settings)
    model.save_pretrained(tmp_path / "copy", save_original_format=False)
    one, other = (condense_pretrained(path, plan=some_plan([1])) for path in (tmp_path / "copy", plain))
    assert not differing(state(one), state(other))


LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
import cdmoe_plugin
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(torch.tensor(json.load(open(sys.argv[1] + "/ids.json")))).logits
print(json.dumps([type(model).__name__, logits.float().tolist()]))
"""


@pytest.mark.parametrize("layout", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("offload", [False, True])
def test_end_to_end(layout: str, offload: bool, tmp_path: Path) -> None:
    """Searched, condensed, saved, and opened by another program."""
    quantised, plain = published.QUANTISED[layout](tmp_path / "checkpoint")
    kwargs = {"offload_folder": str(tmp_path / "offload")} if offload else {}
    model = condense_pretrained(quantised, CONFIG, calibration=IDS, keep_extra=True, **kwargs)
    model.save_pretrained(tmp_path / "saved")
    ids = [IDS[0]]
    (tmp_path / "saved" / "ids.json").write_text(json.dumps(ids))
    name, logits = answer_of(LOGITS, tmp_path / "saved", tmp_path)
    expected = apply_plan(AutoModelForCausalLM.from_pretrained(plain), model.condense_plan)
    assert name == type(expected).__name__
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(logits), expected(torch.tensor(ids)).logits.float(), rtol=0.02, atol=0.02
        )
