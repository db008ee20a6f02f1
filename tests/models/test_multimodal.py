"""Multimodal models: their text decoder is condensed, and the rest of the model and of its checkpoint stays.

`python -m tests.models.test_multimodal` writes docs/multimodal.md; a test fails when it is out of date.
"""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from cdmoe_plugin import (
    CondenseConfig,
    CondensedLayer,
    CondensePlan,
    apply_plan,
    condense_pretrained,
    condensed_module_names,
    export_stock,
    search_plan,
    unfreeze_condensed,
)
from cdmoe_plugin.blocks import UnsupportedModelError, decoder_layers, decoder_of, find_sparse_blocks
from cdmoe_plugin.calibration import calibration_for
from cdmoe_plugin.decoder.stream import LayerStream
from cdmoe_plugin.decoder.whole import searching
from cdmoe_plugin.loading.processing import save_processing
from tests.helpers.models import make_uniform
from tests.helpers.published import read
from tests.helpers.tiny_models import ARCHITECTURES, random_ids
from tests.helpers.wrappers import (
    REFUSED_WRAPPERS,
    WRAPPERS,
    has_text_model,
    image_inputs,
    logits,
    tiny_wrapper,
    wrapper_config,
)

TABLE = Path(__file__).parents[2] / "docs" / "multimodal.md"
TABLE_VERSION = "5.23"
SEEING = [name for name, wrapper in WRAPPERS.items() if wrapper.pixels is not None]
MAIN = ["qwen3_5_moe", "qwen3_vl_moe", "gemma4", "llama4", "glm4v_moe"]
IDS = random_ids(4, 14, vocab=110)
PLAN = CondensePlan([CondensedLayer(3, [1, 2], [0.5, 0.25])])


def pictures(model_type: str, number: int = 3) -> Dataset:
    """Rows as the processor makes them, each with another image and another text."""
    rows = []
    for i in range(number):
        row = image_inputs(model_type)
        row["pixel_values"] = row["pixel_values"] * (i + 1)
        row["input_ids"][:, -1] += i
        rows.append({name: value.tolist() for name, value in row.items()})
    return Dataset.from_list(rows)


@cache
def sparse_layers(model_type: str) -> tuple[int, ...]:
    return ARCHITECTURES[WRAPPERS[model_type].text].sparse_layers


# --- all experts kept under uniform routers give the sparse model's output ---


@pytest.mark.parametrize("model_type", MAIN)
def test_pixels_through_a_model_with_all_experts(model_type: str, tmp_path: Path) -> None:
    model = make_uniform(tiny_wrapper(model_type, num_experts=4, top_k=4))
    inputs = image_inputs(model_type)
    before, names = logits(model, **inputs), {n: p.detach().clone() for n, p in model.named_parameters()}
    layers = sparse_layers(model_type)
    plan = search_plan(model, CondenseConfig(len(layers), 4), calibration=pictures(model_type))
    assert plan.model is not None
    assert plan.model.model_type == WRAPPERS[model_type].text
    apply_plan(model, plan)
    torch.testing.assert_close(logits(model, **inputs), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    darker = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert (logits(model, **darker) - before).abs().max() > 1e-2  # the pixels matter

    path = decoder_layers(model)
    spots = [f"{path}.{layer}." for layer in layers]
    after = dict(model.named_parameters())
    changed = names.keys() ^ after.keys()
    assert changed
    assert all(any(spot in name for spot in spots) for name in changed)
    assert all(torch.equal(names[name], after[name]) for name in names.keys() & after.keys())

    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config.model_type == f"cdmoe_{model.config.model_type.removeprefix('cdmoe_')}"
    assert torch.equal(logits(again, **inputs), logits(model, **inputs))


# --- searched layer by layer ---


@pytest.mark.parametrize("model_type", WRAPPERS)
@torch.no_grad()
def test_layers_of_the_decoder_run_one_by_one(model_type: str) -> None:
    """On text, and where the wrapper has an image to see, on images: the whole model's logits, also for three rows."""
    model = tiny_wrapper(model_type)
    sources: list[Any] = [IDS[:3], *([pictures(model_type)] if model_type in SEEING else [])]
    for source in sources:
        data = calibration_for(model, source, CondenseConfig(2, 2, batch_size=3))
        with searching(model):
            stream = LayerStream(model, decoder_layers(model), data.batches)
            for i, batch in enumerate(data.batches):
                state = stream.embeddings[i]
                for layer in range(len(stream)):
                    halved = (state[0] / 2, *state[1:])
                    together = stream.run_together(layer, [state, halved], i)
                    state = stream.run_layer(layer, state, i)
                    torch.testing.assert_close(together[0][0], state[0], rtol=1e-4, atol=1e-5)
                found = stream.logits(stream.finish(state), i)
                whole = logits(model, input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.others)
                valid = batch.attention_mask.bool()
                torch.testing.assert_close(found[valid], whole[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_only_the_text_decoder_has_sparse_blocks(model_type: str) -> None:
    """A vision tower is no decoder, even with tables of three dimensions or experts of its own."""
    model = tiny_wrapper(model_type)
    blocks = find_sparse_blocks(model)
    assert tuple(block.layer for block in blocks) == sparse_layers(model_type)
    inside = {id(module) for module in decoder_of(model).modules()}
    assert all(id(block.module) in inside for block in blocks)
    assert decoder_of(model).config.model_type == WRAPPERS[model_type].text


def test_experts_of_a_vision_tower_stay() -> None:
    model = tiny_wrapper("dots3_note")
    towers = {name: p.clone() for name, p in model.named_parameters() if "vision_tower" in name}
    assert any(p.ndim == 3 and "experts" in name for name, p in towers.items())
    apply_plan(model, CondensePlan([CondensedLayer(1, [1, 2], [0.5, 0.25])]))
    after = dict(model.named_parameters())
    assert all(torch.equal(tower, after[name]) for name, tower in towers.items())


@pytest.mark.parametrize("model_type", REFUSED_WRAPPERS)
def test_wrappers_that_are_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED_WRAPPERS[model_type][1]) as caught:
        search_plan(tiny_wrapper(model_type), CondenseConfig(1, 2), calibration=IDS)
    assert len(str(caught.value)) < 400


def test_images_steer_the_search() -> None:
    """Features that the model adds between its layers are part of what the next layers see."""
    model = tiny_wrapper("qwen3_vl_moe")
    rows = pictures("qwen3_vl_moe", 1)
    with searching(model):
        data = calibration_for(model, rows, CondenseConfig(2, 2))
        stream = LayerStream(model, decoder_layers(model), data.batches)
        seen: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
            for layer in decoder_of(model).layers  # type: ignore[union-attr]
        ]
        logits(model, input_ids=data.batches[0].input_ids, **data.batches[0].others)
        for hook in hooks:
            hook.remove()
        state = stream.embeddings[0]
        for layer, expected in enumerate(seen):
            torch.testing.assert_close(state[0], expected)
            state = stream.run_layer(layer, state, 0)


def test_rows_that_a_model_cannot_read_are_refused() -> None:
    rows = pictures("qwen3_vl_moe")
    with pytest.raises(ValueError, match=r"pixel_values.*output of its processor"):
        search_plan(tiny_wrapper("gemma4"), CondenseConfig(2, 2), calibration=rows)
    pair = rows.map(lambda row: {"input_ids": row["input_ids"] * 2})
    with pytest.raises(ValueError, match=r"one sequence with its images.*\[2, 24\]"):
        search_plan(tiny_wrapper("qwen3_vl_moe"), CondenseConfig(2, 2), calibration=pair)


def test_padding_of_images_samples_is_left_out() -> None:
    row = image_inputs("llama4")
    padded = {name: value.tolist() for name, value in row.items()}
    padded["input_ids"] = [[0, 0, *padded["input_ids"][0]]]
    padded["attention_mask"] = [[0, 0, *padded["attention_mask"][0]]]
    model, config = tiny_wrapper("llama4"), CondenseConfig(2, 2, max_length=4)
    data = calibration_for(model, Dataset.from_list([padded]), config)
    assert torch.equal(data.batches[0].input_ids, row["input_ids"])  # and is not cut within an image
    plain = calibration_for(model, Dataset.from_list([{n: v.tolist() for n, v in row.items()}]), config)
    assert data.fingerprint == plain.fingerprint
    darker = {**row, "pixel_values": row["pixel_values"] / 2}
    other = calibration_for(model, Dataset.from_list([{n: v.tolist() for n, v in darker.items()}]), config)
    assert other.fingerprint != plain.fingerprint


# --- checkpoints ---


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_a_checkpoint_is_saved_whole(model_type: str, tmp_path: Path) -> None:
    """Unchanged tensors have the base's names on disk, and the auto classes of the base open the result."""
    sparse, base_dir, folder = tiny_wrapper(model_type), tmp_path / "base", tmp_path / "condensed"
    sparse.save_pretrained(base_dir)
    searched = CondenseConfig(1, 2, layers=[3] if 3 in sparse_layers(model_type) else [1])
    model = condense_pretrained(base_dir, searched, calibration=IDS)
    assert isinstance(model, WRAPPERS[model_type].model_class)
    model.save_pretrained(folder)
    base, saved = read(base_dir), read(folder)
    layer = f".{searched.layers[0]}."  # type: ignore[index]
    assert {name for name in base if layer not in name} == {name for name in saved if layer not in name}
    kept = base.keys() & saved.keys()
    assert kept
    assert all(torch.equal(base[name], saved[name]) for name in kept)

    config = json.loads((folder / "config.json").read_text())
    inputs = {"input_ids": torch.tensor(IDS[:1])}
    expected = logits(model, **inputs)
    openers = [name for name in config["auto_map"] if name.startswith("AutoModelFor")]
    assert {"AutoModelForImageTextToText", "AutoModelForCausalLM"} <= set(openers)
    for name in openers if model_type in MAIN else ["AutoModelForImageTextToText"]:
        assert torch.equal(logits(getattr(transformers, name).from_pretrained(folder), **inputs), expected)
    assert type(AutoConfig.from_pretrained(folder)).__name__ == f"CDMoE{type(sparse.config).__name__}"
    if "AutoModel" in config["auto_map"]:
        body = AutoModel.from_pretrained(folder)
        assert body.config.condense_config["condensed_layers"].keys() == {layer.strip(".")}


@pytest.mark.parametrize("model_type", [*MAIN, "unlimited_ocr"])
def test_decoder_layers_stay_on_disk(model_type: str, tmp_path: Path) -> None:
    """Layers of a vision tower are not taken for those of the decoder, nor weights around it forgotten."""
    sparse, inputs = tiny_wrapper(model_type), {"input_ids": torch.tensor(IDS[:1])}
    if model_type in SEEING:
        inputs = image_inputs(model_type)
    sparse.save_pretrained(tmp_path / "base")
    expected = logits(apply_plan(sparse, PLAN), **inputs)
    model = condense_pretrained(tmp_path / "base", plan=PLAN, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model, **inputs), expected)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, **inputs), expected)


@pytest.mark.parametrize("model_type", MAIN)
def test_tools_for_condensed_models(model_type: str, tmp_path: Path) -> None:
    config = wrapper_config(model_type)
    model, twin = (WRAPPERS[model_type].model_class(config).eval() for _ in range(2))
    apply_plan(model, PLAN)
    assert config.get_text_config() is not model.config.get_text_config()
    assert twin.config is config
    assert not hasattr(config, "condense_config")
    trained = unfreeze_condensed(model)
    path = f"{decoder_layers(model)}.3."
    assert trained
    assert all(path in name for name in trained)
    names = condensed_module_names(model)
    assert len(names) == 3
    assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in names)
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=names))
    assert sum("lora_A" in name for name, _ in tuned.named_parameters()) == 3
    with pytest.raises(UnsupportedModelError, match="part of a larger model"):
        export_stock(model, tmp_path / "stock", approximate=True)
    with pytest.raises(UnsupportedModelError, match="part of a multimodal model"):
        search_plan(tiny_wrapper(model_type), CondenseConfig(1, form="trim_block"), calibration=IDS)


def test_tensor_parallel_plan_of_a_condensed_decoder() -> None:
    """The plan of the text model has other words for a dense layer than a gated shared expert needs."""
    model = tiny_wrapper("qwen3_5_moe")
    apply_plan(model, PLAN)
    fresh = type(model)(model.config)
    plan, place = fresh.tp_plan, "model.language_model.layers.*.mlp"
    assert plan[f"{place}.gate_proj"] == plan[f"{place}.up_proj"] == "colwise_gather_output"
    assert plan[f"{place}.down_proj"] == "rowwise_split_input"
    assert f"{place}.experts.gate_up_proj" in plan
    gemma = tiny_wrapper("gemma4")
    experts = "model.language_model.layers.*.experts"
    assert any(f"{name}.".startswith(f"{experts}.") for name in gemma.tp_plan)
    apply_plan(gemma, PLAN)
    assert not any(f"{name}.".startswith(f"{experts}.") for name in type(gemma)(gemma.config).tp_plan)


def test_router_loss_of_a_text_config_is_silenced() -> None:
    model = tiny_wrapper("qwen3_vl_moe")
    text = model.config.get_text_config()
    text.output_router_logits, text.router_aux_loss_coef = True, 0.1
    layers = sparse_layers("qwen3_vl_moe")
    apply_plan(model, CondensePlan([CondensedLayer(layer, [1, 2], [0.5, 0.25]) for layer in layers]))
    silenced = model.config.get_text_config()
    assert not silenced.output_router_logits
    assert silenced.router_aux_loss_coef == 0.0
    assert text.router_aux_loss_coef == 0.1  # of another model, perhaps


def test_a_card_says_that_the_model_sees(tmp_path: Path) -> None:
    model = apply_plan(tiny_wrapper("gemma4"), PLAN)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText" in card
    assert "AutoProcessor" in card
    assert "the vision part and all else are the base model's" in card


def test_processor_files_are_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "preprocessor_config.json").write_text('{"image_processor_type": "SomeProcessor"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "model.safetensors").write_text("")
    save_processing(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["chat_template.jinja", "preprocessor_config.json"]
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    shutil.rmtree(source)


# --- the table ---


def table() -> str:
    refused = {"minimax_m3_vl": "transformers fuses gate and up of every MLP of its checkpoints"}
    refused |= {"diffusion_gemma": "its experts belong to two decoders"}
    refused |= {"ernie4_5_vl_moe": "its blocks have several sets of experts, chosen by the type of each token"}
    lines = [
        "# Multimodal models",
        "",
        f"Wrappers of transformers {TABLE_VERSION} whose text part is a Mixture of Experts, each tried on a tiny model",
        "with random weights. The text decoder is condensed and the whole model saved; `text_only` saves the text",
        "model alone where transformers has a class for it.",
        "`python -m tests.models.test_multimodal` writes this file; a test fails when it is out of date.",
        "",
        "| model type | class | text part | images as calibration data | `text_only` |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, wrapper in sorted(WRAPPERS.items()):
        images = "tested" if name in SEEING else "not tested"
        alone = "yes" if has_text_model(name) else "no"
        lines.append(f"| {name} | {wrapper.model} | {wrapper.text} | {images} | {alone} |")
    lines += ["", "Refused as a whole:", "", "| model type | text part | reason |", "| --- | --- | --- |"]
    lines += [f"| {name} | {REFUSED_WRAPPERS[name][0].text} | {reason} |" for name, reason in sorted(refused.items())]
    lines += [
        "",
        "`qwen3_omni_moe` is condensed in its thinker, and `nemo_speechlm` is not tested; `inkling_mm_model` and",
        "`muse_spark` are refused for their text part ([architectures](architectures.md)). `internvl`, `mistral3`,",
        "`llava` and `lfm2_vl` are examples of wrappers that take any text model.",
    ]
    return "\n".join(lines) + "\n"


def test_the_table_is_up_to_date() -> None:
    assert TABLE.read_text(encoding="utf-8") == table()


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
