"""Condense adapters: what they compute beside `apply_plan`, what they save, and what they refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from cdmoe_plugin import (
    CondenseAdapterConfig,
    CondenseConfig,
    CondensedLayer,
    CondensePlan,
    apply_plan,
    condense_pretrained,
    search_plan,
)
from tests.helpers.exporting import same
from tests.helpers.models import IDS, TYPES, sparse_model
from tests.helpers.models import output as output_of
from tests.helpers.plans import some_plan
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import ARCHITECTURES, tiny_model
from tests.helpers.wrappers import tiny_wrapper

PLAN = some_plan([1, 3])
WEIGHTS = "adapter_model.safetensors"


@torch.no_grad()
def output(model: Any) -> Tensor:
    """The output of a model, or of the one inside a `PeftModel`."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    if model.config.model_type.endswith("deepseek"):
        return model(input_ids=torch.tensor(IDS[:1])).logits
    return output_of(model.eval())


def adapter(model: PreTrainedModel | None = None, plan: Any = PLAN, **kwargs: Any) -> Any:
    config = CondenseAdapterConfig(plan=plan, task_type="CAUSAL_LM", **kwargs)
    return get_peft_model(tiny_model("qwen2_moe") if model is None else model, config)


def trained(model: Any) -> Any:
    """The same model, its adapter's weights moved as by training."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint in `base`, and in `adapter` one that is trained."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny_model("qwen2_moe").save_pretrained(folder / "base")
    trained(adapter(open_base(folder))).save_pretrained(folder / "adapter")
    return folder


def open_base(place: Path, **kwargs: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(place / "base", **kwargs)


@pytest.fixture(scope="module")
def expected(place: Path) -> Tensor:
    """The output of the trained model, from a condensed checkpoint with its weights put in by hand."""
    model = apply_plan(open_base(place), PLAN)
    names = {name.replace("base_model.model.", "").replace(".cdmoe_mlp.", "."): name for name in saved(place)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.copy_(saved(place)[names.pop(name)])
    assert not names
    return output(model)


def saved(place: Path) -> dict[str, Tensor]:
    return load_file(place / "adapter" / WEIGHTS)


# --- all architectures ---


def sparse_layers(model_type: str) -> tuple[int, ...]:
    return ARCHITECTURES[model_type].sparse_layers if model_type in ARCHITECTURES else (1, 2, 3)


@pytest.mark.parametrize("model_type", [*TYPES, "deepseek"])
def test_every_architecture(model_type: str, tmp_path: Path) -> None:
    """Two budgets beside each other, as `apply_plan` makes them; off, unloaded, saved under other names and merged."""
    equal = same if model_type == "jamba" else torch.equal  # its own runs differ by rounding, depending on the machine
    plan = some_plan(list(sparse_layers(model_type)))
    plans = {"default": plan, "small": plan.truncate(1, 1)}
    models = {name: apply_plan(sparse_model(model_type), plan) for name, plan in plans.items()}
    outputs = {name: output(model) for name, model in models.items()}
    base = sparse_model(model_type)
    sparse, before = output(base), state(base)
    assert not equal(outputs["small"], outputs["default"])

    model = get_peft_model(base, CondenseAdapterConfig(plan=plans["default"]))
    model.add_adapter("small", CondenseAdapterConfig(plan=plans["small"]))
    for name in ("small", "default"):
        model.set_adapter(name)
        assert equal(output(model), outputs[name])
    with model.disable_adapter():
        assert equal(output(model), sparse)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(sparse_model(model_type), tmp_path, adapter_name="first")
    loaded.load_adapter(tmp_path / "small", "second")
    assert equal(output(loaded), outputs["default"])
    loaded.set_adapter("second")
    assert equal(output(loaded), outputs["small"])
    assert not differing(state(loaded.unload()), before)

    merged = model.merge_and_unload()
    assert type(merged) is type(models["default"])
    assert merged.config.to_dict() == models["default"].config.to_dict()
    assert not differing(state(merged), state(models["default"]))


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "gemma4", "dots3_note"])
@torch.no_grad()
def test_multimodal_models(model_type: str, tmp_path: Path) -> None:
    """The vision tower of the last has layers of the same names, with experts."""
    plan, inputs = CondensePlan([CondensedLayer(3, [1, 2], [0.5, 0.25])]), {"input_ids": torch.tensor(IDS[:1])}
    condensed = apply_plan(tiny_wrapper(model_type), plan)
    expected, sparse = condensed(**inputs).logits, tiny_wrapper(model_type)(**inputs).logits
    model = get_peft_model(tiny_wrapper(model_type), CondenseAdapterConfig(plan=plan))
    assert torch.equal(model(**inputs).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, sparse)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_wrapper(model_type), tmp_path)
    assert torch.equal(loaded(**inputs).logits, expected)
    assert not differing(state(loaded.merge_and_unload()), state(condensed))


def test_more_layers_than_peft_lists(tmp_path: Path) -> None:
    """PEFT shortens long lists of names, and then means other layers as well."""
    layers = list(range(2, 26))
    sizes = {"num_layers": 27, "num_experts": 2, "hidden": 8, "heads": 1, "kv_heads": 1}
    plan = CondensePlan([CondensedLayer(layer, [1], [0.5]) for layer in layers])
    model = adapter(tiny_model("qwen2_moe", **sizes), plan)
    assert torch.equal(output(model), output(apply_plan(tiny_model("qwen2_moe", **sizes), plan)))
    model.save_pretrained(tmp_path)
    assert {int(name.split(".")[4]) for name in load_file(tmp_path / WEIGHTS)} == set(layers)


# --- files ---


def test_what_is_saved(place: Path) -> None:
    condensed = {name for name in state(apply_plan(open_base(place), PLAN)) if name.split(".")[2:3] in (["1"], ["3"])}
    names = {name.removeprefix("base_model.model.").replace(".cdmoe_mlp", "") for name in saved(place)}
    assert names == {name for name in condensed if ".mlp." in name}
    config = json.loads((place / "adapter" / "adapter_config.json").read_text())
    assert CondensePlan.from_dict(config["plan"]).layers == PLAN.layers
    for text in (config["requires"], (place / "adapter" / "README.md").read_text()):
        assert "import" in text
        assert "cdmoe_plugin" in text
    assert CondensePlan.load(place / "adapter") == CondensePlan.from_dict(config["plan"])


def test_every_way_to_open_it(place: Path, expected: Tensor) -> None:
    folder = place / "adapter"
    assert torch.equal(output(PeftModel.from_pretrained(open_base(place), folder, adapter_name="other")), expected)
    assert torch.equal(output(PeftModel.from_pretrained(open_base(place), folder, low_cpu_mem_usage=True)), expected)
    assert torch.equal(output(AutoPeftModelForCausalLM.from_pretrained(folder)), expected)
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(folder)), expected)
    model = open_base(place)
    sparse = output(model)
    model.load_adapter(str(folder), "other")
    assert torch.equal(output(model), expected)
    model.disable_adapters()
    assert torch.equal(output(model), sparse)


def test_beside_each_other(place: Path, expected: Tensor) -> None:
    model = PeftModel.from_pretrained(open_base(place), place / "adapter")
    model.add_adapter("small", CondenseAdapterConfig(plan=PLAN.truncate(1, 1), task_type="CAUSAL_LM"))
    assert torch.equal(output(model), expected)
    model.set_adapter("small")
    assert torch.equal(output(model), output(apply_plan(open_base(place), PLAN.truncate(1, 1))))
    assert model.get_model_status().active_adapters == ["small"]
    model.set_adapter("default")
    model.delete_adapter("small")
    assert torch.equal(output(model), expected)
    assert not [name for name in state(model) if "small" in name]


@pytest.mark.parametrize("change", ["missing", "foreign"])
def test_weights_that_are_not_all_there(place: Path, tmp_path: Path, change: str) -> None:
    PeftModel.from_pretrained(open_base(place), place / "adapter").save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    tensor = weights.pop(next(iter(weights)))
    if change == "foreign":
        weights["base_model.model.model.layers.2.mlp.cdmoe_mlp.up_proj.weight"] = tensor
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not those of its config: . are missing or not in the config"):
        PeftModel.from_pretrained(open_base(place), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights of the adapter 'default' were not loaded"):
        output(model)


def test_a_saved_config_without_its_weights(place: Path) -> None:
    model = get_peft_model(open_base(place), PeftConfig.from_pretrained(place / "adapter"))
    with pytest.raises(ValueError, match=r"weights of the adapter 'default' were not loaded.*folds the experts"):
        output(model)
    with pytest.raises(ValueError, match="were not loaded"):
        model.merge_and_unload()
    fresh = adapter(open_base(place), place / "adapter")
    assert torch.equal(output(fresh), output(apply_plan(open_base(place), PLAN)))


def test_another_base(place: Path) -> None:
    for base, message in (
        (tiny_model("qwen2_moe", num_experts=4), "made for another model"),
        (tiny_model("mixtral"), "made for another model: its model_type is 'qwen2_moe'"),
        (apply_plan(open_base(place), PLAN), r"condensed already \(decoder layers \[1, 3\]\)"),
    ):
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, place / "adapter")


def test_a_config_that_was_edited(place: Path, tmp_path: Path) -> None:
    PeftModel.from_pretrained(open_base(place), place / "adapter").save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    for old, new, message in (
        ('"hidden_act": "silu"', '"hidden_act": "none"', "`layers` of the adapter's config can't be understood"),
        ('"version": 1', '"version": 2', "`version`"),
    ):
        (tmp_path / "adapter_config.json").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(open_base(place), tmp_path)
    values = json.loads(text)
    del values["layers"]["1"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"`layers` of the adapter's config has \['3'\]"):
        PeftModel.from_pretrained(open_base(place), tmp_path)


def test_parts_of_peft_that_take_any_method(place: Path, tmp_path: Path, expected: Tensor) -> None:
    """Save one of several, use subfolders, move weights by hand, pickle, freeze and inject, as for PEFT's methods."""
    model = PeftModel.from_pretrained(open_base(place), place / "adapter", is_trainable=True)
    model.add_adapter("small", CondenseAdapterConfig(plan=PLAN.truncate(1, 1), task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path, selected_adapters=["small"], safe_serialization=False)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["small"]
    small = PeftModel.from_pretrained(open_base(place), tmp_path, subfolder="small")
    assert torch.equal(output(small), output(apply_plan(open_base(place), PLAN.truncate(1, 1))))

    injected = inject_adapter_in_model(CondenseAdapterConfig(plan=PLAN), open_base(place))
    assert torch.equal(output(injected), output(apply_plan(open_base(place), PLAN)))
    set_peft_model_state_dict(injected, get_peft_model_state_dict(model))
    assert torch.equal(output(injected), expected)

    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(output(whole), expected)
    with whole.disable_adapter():
        assert torch.equal(output(whole), output(open_base(place)))

    model.set_requires_grad("default", False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.delete_adapter("default")
    assert model.active_adapters == ["small"]
    assert torch.equal(output(model), output(small))
    in_half = get_peft_model(
        open_base(place, dtype="bfloat16"), CondenseAdapterConfig(plan=PLAN), autocast_adapter_dtype=False
    )
    assert {parameter.dtype for parameter in in_half.parameters()} == {torch.bfloat16}


# --- what is refused ---


def test_a_peft_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseTuner, "_remove_adapter_name_from_key")
    with pytest.raises(ImportError, match=r"need peft 0\.21 or later, but peft is 0"):
        CondenseAdapterConfig(plan=PLAN)


def test_plans_that_are_refused(place: Path) -> None:
    with pytest.raises(ValueError, match="`plan` is missing"):
        CondenseAdapterConfig()
    with pytest.raises(ValueError, match="`plan` should be a CondensePlan or a path"):
        CondenseAdapterConfig(plan=3)
    with pytest.raises(ValueError, match=r"`form` is 'trim_layer': use `apply_plan`"):
        CondenseAdapterConfig(plan=PLAN.as_trimming("trim_layer"))
    with pytest.raises(ValueError, match="decoder layer 0, which is not a sparse layer"):
        adapter(open_base(place), some_plan([0]))


def test_merging_in_place_is_refused(place: Path) -> None:
    model = adapter(open_base(place))
    with pytest.raises(ValueError, match=r"`merge_adapter\(\)`.*not supported. `merge_and_unload"):
        model.merge_adapter()
    assert torch.equal(output(model), output(apply_plan(open_base(place), PLAN)))


def test_one_at_a_time(place: Path) -> None:
    model = adapter(open_base(place))
    model.add_adapter("small", CondenseAdapterConfig(plan=PLAN.truncate(1, 1)))
    with pytest.raises(ValueError, match=r"Only one condense adapter .* \['default', 'small'\]"):
        model.base_model.set_adapter(["default", "small"])
    with pytest.raises(ValueError, match="can be merged, not"):
        model.merge_and_unload(adapter_names=["default", "small"])
    with pytest.raises(ValueError, match="`adapter_names`"):
        model(input_ids=torch.tensor(IDS[:1]), adapter_names=["small"])
    merged = model.merge_and_unload(adapter_names=["small"])
    assert torch.equal(output(merged), output(apply_plan(open_base(place), PLAN.truncate(1, 1))))


def test_names_of_adapters(place: Path) -> None:
    """PEFT would leave out weights of one adapter that have the name of another in theirs."""
    model = adapter(open_base(place))
    for name in ("mlp", "up_proj", "layers", "1"):
        with pytest.raises(ValueError, match=f"can't be called '{name}'"):
            model.add_adapter(name, CondenseAdapterConfig(plan=PLAN, task_type="CAUSAL_LM"))
        with pytest.raises(ValueError, match=f"can't be called '{name}'"):
            get_peft_model(open_base(place), CondenseAdapterConfig(plan=PLAN), adapter_name=name)
    with pytest.raises(ValueError, match=r"has a condense adapter 'default' already: use another name, or call"):
        get_peft_model(model.get_base_model(), CondenseAdapterConfig(plan=some_plan([2])))


def test_the_last_adapter_is_deleted(place: Path) -> None:
    model = adapter(open_base(place))
    model.delete_adapter("default")
    assert torch.equal(output(model.base_model.model), output(open_base(place)))


def test_copies_are_apart() -> None:
    model = adapter(tiny_model("granitemoeshared"))
    before, twin = output(model), copy.deepcopy(model)
    twin.base_model.disable_adapter_layers()
    assert torch.equal(output(twin), output(tiny_model("granitemoeshared")))
    assert torch.equal(output(model), before)


def test_generation(place: Path) -> None:
    model, ids = adapter(open_base(place)), torch.tensor(IDS[:1])
    settings = {"max_new_tokens": 6, "do_sample": False}
    condensed = apply_plan(open_base(place), PLAN).generate(ids, **settings)
    assert torch.equal(model.generate(input_ids=ids, **settings), condensed)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=ids, **settings), open_base(place).generate(ids, **settings))


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
def test_other_heads(place: Path, tmp_path: Path, auto_class: Any) -> None:
    def opened() -> PreTrainedModel:
        torch.manual_seed(0)
        model = auto_class.from_pretrained(place / "base")
        model.config.pad_token_id = 0
        return model

    task = "SEQ_CLS" if auto_class is AutoModelForSequenceClassification else "FEATURE_EXTRACTION"
    model = get_peft_model(opened(), CondenseAdapterConfig(plan=PLAN, task_type=task))
    expected = trained(model)(input_ids=torch.tensor(IDS[:1]))[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(opened(), tmp_path)
    for each in (loaded, loaded.merge_and_unload()):
        assert torch.equal(each(input_ids=torch.tensor(IDS[:1]))[0], expected)


def test_other_methods_beside_it(place: Path) -> None:
    other = LoraConfig(target_modules=["q_proj"])
    merge_first = r"can't be combined with other methods.*merge_and_unload\(\)`, and put the other"
    lora = get_peft_model(open_base(place), other)
    with pytest.raises(ValueError, match=merge_first):
        get_peft_model(lora.get_base_model(), CondenseAdapterConfig(plan=PLAN))
    with pytest.raises(ValueError, match=merge_first):
        lora.add_adapter("condensed", CondenseAdapterConfig(plan=PLAN))
    with pytest.raises(ValueError, match=merge_first):
        get_peft_model(open_base(place), CondenseAdapterConfig(plan=PLAN), mixed=True)
    mixed = get_peft_model(open_base(place), other, mixed=True)
    with pytest.raises(ValueError, match=merge_first):
        mixed.add_adapter("condensed", CondenseAdapterConfig(plan=PLAN))
    mixed.add_adapter("second", other)
    model = adapter(open_base(place))
    with pytest.raises(ValueError, match=merge_first):
        model.add_adapter("lora", other)
    get_peft_model(model.get_base_model(), other)
    for leave in (model.merge_and_unload, model.unload):
        with pytest.raises(ValueError, match="can't be combined with other methods"):
            leave()


def test_where_a_sparse_model_is_needed(place: Path) -> None:
    model = adapter(open_base(place))
    config = CondenseConfig(num_layers=1, num_experts=1)
    for given in (model, model.get_base_model()):
        with pytest.raises(
            ValueError, match=r"condense adapters \('default', as in .*`peft_model.unload\(\)` returns the"
        ):
            search_plan(given, config, calibration=IDS)
        with pytest.raises(ValueError, match="The model has condense adapters"):
            apply_plan(given, PLAN)
    assert search_plan(model.unload(), config, calibration=IDS).layers
    with pytest.raises(ValueError, match=r"CDMOE adapter for .*: use `condense_pretrained\(base, plan="):
        condense_pretrained(place / "adapter", plan=PLAN)


def test_safe_merging(place: Path) -> None:
    model = adapter(open_base(place))
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"decoder layers \[1\] have weights that are not finite"):
        model.merge_and_unload(safe_merge=True)
    assert not output(model.merge_and_unload()).isfinite().all()
