"""A small model straight from a saved condense adapter, beside the adapter merged into the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from cdmoe_plugin import CondenseAdapterConfig, CondenseConfig, CondensePlan, apply_plan, condense_pretrained
from cdmoe_plugin.scripts import condense
from tests.helpers.checkpoints import Reads, experts_read
from tests.helpers.models import IDS, output
from tests.helpers.plans import some_plan
from tests.helpers.recovery import word_tokenizer
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import tiny_model

PLAN = some_plan([1, 3])
WEIGHTS = "adapter_model.safetensors"


def write(folder: Path, model_type: str, **config: Any) -> PreTrainedModel:
    """Writes a base model and an adapter with weights of its own; returns the merged model."""
    tiny_model(model_type).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, CondenseAdapterConfig(plan=PLAN, task_type="CAUSAL_LM", **config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "adapter")
    return model.merge_and_unload().eval()


@pytest.mark.parametrize("model_type", ["qwen2_moe", "granitemoeshared", "gemma4_text", "minimax_m2", "afmoe"])
def test_a_small_model_from_an_adapter(model_type: str, tmp_path: Path, reads: Reads) -> None:
    merged = write(tmp_path, model_type)
    model = condense_pretrained(tmp_path / "base", plan=tmp_path / "adapter")
    assert type(model) is type(merged)
    assert not differing(state(model), state(merged))
    kept = {layer.layer: sorted(layer.experts) for layer in PLAN.layers}
    assert {layer: sorted(set(experts_read(reads, layer))) for layer in kept} == kept
    model.save_pretrained(tmp_path / "condensed")
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "condensed")), output(merged))


def test_from_a_loaded_model(tmp_path: Path) -> None:
    merged = write(tmp_path, "qwen2_moe")
    for make in (apply_plan, lambda base, plan: condense_pretrained(base, plan=plan)):
        model = make(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        assert not differing(state(model), state(merged))
    only_plan = apply_plan(tiny_model("qwen2_moe"), CondensePlan.load(tmp_path / "adapter"))
    assert not differing(state(only_plan), state(apply_plan(tiny_model("qwen2_moe"), PLAN)))


def test_with_layers_on_the_disk(tmp_path: Path) -> None:
    merged = write(tmp_path, "qwen2_moe")
    model = condense_pretrained(tmp_path / "base", plan=tmp_path / "adapter", offload_folder=str(tmp_path / "disk"))
    assert {p.device.type for name, p in model.named_parameters() if ".layers." in name} == {"meta"}
    assert torch.equal(output(model), output(merged))
    model.save_pretrained(tmp_path / "condensed")
    assert not differing(state(AutoModelForCausalLM.from_pretrained(tmp_path / "condensed")), state(merged))


def test_with_other_modules(tmp_path: Path) -> None:
    merged = write(tmp_path, "qwen2_moe", modules_to_save=["lm_head"])
    model = condense_pretrained(tmp_path / "base", plan=tmp_path / "adapter", dtype="bfloat16")
    rounded = {name: tensor.bfloat16() for name, tensor in merged.named_parameters()}
    assert differing(dict(model.named_parameters()), rounded) == []
    assert differing(rounded, {name: p.bfloat16() for name, p in tiny_model("qwen2_moe").named_parameters()})


def test_on_the_command_line(tmp_path: Path) -> None:
    merged = write(tmp_path, "qwen2_moe")
    word_tokenizer().save_pretrained(tmp_path / "base")
    parser = condense.make_parser()

    def run(*options: object) -> None:
        words = ["--model_name_or_path", tmp_path / "base", "--plan", tmp_path / "adapter", *options]
        args, search = parser.parse_args_and_config(
            args=[*map(str, words), "--output_dir", str(tmp_path / "condensed")]
        )
        condense.run(args, {name: value for name, value in vars(search).items() if value is not None})

    with pytest.raises(ValueError, match="weights for its whole plan, which `num_layers`"):
        run("--num_layers", 1)
    run()
    assert not differing(state(AutoModelForCausalLM.from_pretrained(tmp_path / "condensed")), state(merged))


def test_adapters_that_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "qwen2_moe")
    with pytest.raises(ValueError, match=r"`refit` is 'down_proj', but .* get the weights of the adapter"):
        condense_pretrained(
            tmp_path / "base", CondenseConfig(refit="down_proj"), plan=tmp_path / "adapter", calibration=IDS
        )
    file = tmp_path / "adapter" / WEIGHTS
    weights = load_file(file)
    first = next(iter(weights))
    for change in (
        {key: tensor for key, tensor in weights.items() if key != first},
        {**weights, first: weights[first][:-1].clone()},
        {**weights, "base_model.model.model.layers.2.mlp.cdmoe_mlp.up_proj.weight": torch.zeros(1)},
        {**weights, "base_model.model.nothing.weight": torch.zeros(1)},
    ):
        save_file(change, file)
        with pytest.raises(ValueError, match=r"weights of the adapter .* do not fit .*: 1 are missing"):
            condense_pretrained(tmp_path / "base", plan=tmp_path / "adapter")
    file.unlink()
    with pytest.raises(ValueError, match=r"has no weights: there is no adapter_model\.safetensors"):
        condense_pretrained(tmp_path / "base", plan=tmp_path / "adapter")
    lora = get_peft_model(tiny_model("qwen2_moe"), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="has no `plan`: it is the config of an adapter of type 'LORA'"):
        condense_pretrained(tmp_path / "base", plan=tmp_path / "lora")
