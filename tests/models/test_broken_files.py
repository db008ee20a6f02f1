"""Configs, search states and checkpoints' configs that are broken or hostile: understood, or refused with a reason."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from cdmoe_plugin import CondenseConfig, CondensePlan, apply_plan, search_plan
from cdmoe_plugin.model.lookup import condensed_layers
from cdmoe_plugin.search.check import check_methods
from cdmoe_plugin.search.state import FILE, SearchState, _checksum
from tests.helpers.broken_json import ODD, RAW, VALUES, edited, places, written
from tests.helpers.plans import some_plan
from tests.helpers.tiny_models import random_ids, tiny_model

FUZZ = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# --- configs ---

CONFIG = CondenseConfig(num_layers=2, num_experts=2)
NAMES = [field.name for field in fields(CondenseConfig)]
WORDS = ["auto", "greedy", "js", "4GB", "1" * 400 + "GB", "300M params", "9" * 400 + " params", "infGB", "-1GB", "nanB"]


def understood_config(text: str) -> None:
    """It is refused with a ValueError that says something, or it can be written, read, and used."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return
    try:
        config = CondenseConfig.from_dict(values)
        check_methods(config)
    except ValueError as error:
        reason = str(error)
    else:
        assert CondenseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        return
    assert re.search("`[a-z_]+`|CondenseConfig", reason)  # it names the field


@FUZZ
@given(
    values=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), VALUES | st.sampled_from(WORDS), max_size=4)
)
def test_any_config(values: Any) -> None:
    understood_config(written(values))


@FUZZ
@given(values=edited(CONFIG.to_dict()))
def test_an_edited_config(values: Any) -> None:
    understood_config(written(values))


@pytest.mark.parametrize("name", NAMES)
def test_any_one_field(name: str) -> None:
    for value in [*ODD, *RAW, *WORDS]:
        understood_config(written({name: value}))
        understood_config(written({"num_experts": "auto", "expert_budget": 4, name: value}))


# --- states of searches ---

IDS = random_ids(4)
Searched = tuple[PreTrainedModel, Path, dict[str, Any]]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A model, and the file that a search on it has left, with its content."""
    model, folder = tiny_model("qwen2_moe"), tmp_path_factory.mktemp("state")
    search_plan(model, CONFIG, calibration=IDS, state_dir=folder)
    return model, folder / FILE, json.loads((folder / FILE).read_text())


def read_state(path: Path, text: str | bytes, content: dict[str, Any]) -> SearchState | None:
    """The state of this text; None if it is refused for a reason."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        return SearchState(path.parent, content["fingerprint"], {1: 8, 2: 8, 3: 8})
    except ValueError as error:
        reason = str(error)
    assert str(path) in reason
    assert re.search(r"not a valid search state \(.+\): delete it|belongs to another search: its .+ differ", reason)
    return None


def with_checksum(content: dict[str, Any], results: Any) -> str:
    """The state with other results, by somebody who knows about the checksum."""
    checksum = _checksum(content["fingerprint"], json.loads(written(results)))
    return written({**content, "results": results, "checksum": checksum})


@FUZZ
@given(data=st.data())
def test_a_state_that_was_edited(searched: Searched, data: st.DataObject) -> None:
    _, path, content = searched
    state = read_state(path, written(data.draw(edited(content))), content)
    assert state is None or state.results == content["results"]


@FUZZ
@given(data=st.data())
def test_a_state_that_was_edited_with_care(searched: Searched, data: st.DataObject) -> None:
    """By somebody who knows about the checksum: then all that is left to check is whether it can be used."""
    _, path, content = searched
    results = data.draw(edited(content["results"]))
    try:
        results = json.loads(written(results))
        text = json.dumps({**content, "results": results, "checksum": _checksum(content["fingerprint"], results)})
    except RecursionError:
        return
    state = read_state(path, text, content)
    if state is not None:
        assert {name.partition(" ")[0] for name in state} <= {"experts", "layers"} or state.results != content[
            "results"
        ]
        SearchState(path.parent, content["fingerprint"], {1: 8, 2: 8, 3: 8})["new"] = 1.0


def test_a_state_that_breaks_off(searched: Searched) -> None:
    _, path, content = searched
    text = json.dumps(content)
    assert read_state(path, text, content) is not None
    for end in range(0, len(text), 7):
        assert read_state(path, text[:end], content) is None


@FUZZ
@given(noise=st.binary(min_size=1, max_size=4), at=st.floats(0, 1))
def test_a_state_with_broken_bytes(searched: Searched, noise: bytes, at: float) -> None:
    _, path, content = searched
    text = json.dumps(content).encode()
    start = int(at * len(text))
    state = read_state(path, text[:start] + noise + text[start + len(noise) :], content)
    assert state is None or state.results == content["results"]


@FUZZ
@given(noise=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-16")))
def test_any_file_as_a_state(searched: Searched, noise: bytes) -> None:
    _, path, content = searched
    assert read_state(path, noise, content) is None


UNUSABLE = [
    ("experts 2", {}, "should hold experts, scores and gates"),
    ("experts 2", 0.5, "should hold experts, scores and gates"),
    ("experts 2", {"experts": [8, 1]}, r"names experts \[8, 1\], but should name experts from 0 to 7"),
    ("experts 2", {"experts": [-1, 1]}, "whole number of at least 0"),
    ("experts 2", {"experts": [1, 1]}, "more than once"),
    ("experts 2", {"experts": [1]}, "1 experts but 2 gates"),
    ("experts 2", {"experts": "12"}, "should be a list"),
    ("experts 2", {"gates": [0.5, "@huge"]}, "finite number"),
    ("experts 2", {"gates": [0.5, None]}, "finite number"),
    ("experts 2", {"scores": []}, "should have 3 values"),
    ("experts 2", {"scores": None}, "should hold experts, scores and gates"),
    ("experts 2", {"scores": [1, 2, True]}, "finite number"),
    ("experts 2", {"tokens": [1]}, "2 experts but 1 counts"),
    ("experts 2", {"tokens": [1, -1]}, "whole number of at least 0"),
    ("experts 2", {"other": 1}, "should hold experts, scores and gates"),
    ("experts 0", {}, "a layer that is not searched"),
    ("experts x", {}, "a layer that is not searched"),
    ("layers 2", "0.5", "finite number"),
    ("layers 2", "@huge", "finite number"),
    ("layers 2", 10**400, "finite number"),
    ("layers 2", [0.5], "finite number"),
]


@pytest.mark.parametrize(("name", "change", "reason"), UNUSABLE, ids=range(len(UNUSABLE)))
def test_a_state_that_can_not_be_used(searched: Searched, name: str, change: Any, reason: str) -> None:
    """What a search would trip over is refused before it begins."""
    model, path, content = searched
    result = {**content["results"]["experts 2"], **change} if isinstance(change, dict) and change else change
    path.write_text(with_checksum(content, {**content["results"], name: result}))
    with pytest.raises(ValueError, match=rf"{FILE} is not a valid search state \(.*{reason}.*\): delete it"):
        search_plan(model, CONFIG, calibration=IDS, state_dir=path.parent)


# --- configs of condensed checkpoints ---


@pytest.fixture(scope="module", params=["condense", "trim_layer"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A condensed checkpoint, and what its config.json holds."""
    folder = tmp_path_factory.mktemp(request.param)
    plan = some_plan([1, 3])
    plan = plan if request.param == "condense" else plan.as_trimming(request.param)
    apply_plan(tiny_model("qwen2_moe"), plan).save_pretrained(folder)
    return folder, json.loads((folder / "config.json").read_text())


def open_edited(folder: Path, config: dict[str, Any]) -> None:
    """It is refused for a reason, or everything can be done with it that can be done with a condensed model."""
    (folder / "config.json").write_text(written(config))
    if "[" * 500 in written(config):  # transformers reads the file first, and Python can't
        return
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model(torch.tensor(IDS[:1])).logits.shape == (1, len(IDS[0]), 128)
        condensed_layers(model)
        assert isinstance(model.condense_plan, CondensePlan | None)
        model.save_pretrained(folder.parent / "again")
    except (ValueError, RuntimeError) as error:
        reason = str(error)
    else:
        return
    assert re.search(r"condense_config|condense plan|lacks \d+ weights|have no place|ignore_mismatched_sizes", reason)


@settings(FUZZ, max_examples=120)
@given(data=st.data())
def test_an_edited_checkpoint(checkpoint: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    folder, config = checkpoint
    open_edited(folder, {**config, "condense_config": data.draw(edited(config["condense_config"]))})


def test_any_one_change_of_a_checkpoint(checkpoint: tuple[Path, dict[str, Any]]) -> None:
    folder, config = checkpoint
    for key in ("all_condensed", "base_model", "parameters", "plan", "recovery"):
        for odd in (None, 1, 10**400, "1", [1], {}, {"before": 0, "after": 0}):
            open_edited(folder, {**config, "condense_config": {**config["condense_config"], key: odd}})
    layer = config["condense_config"]["condensed_layers"]["3"]
    for *_, key in places(layer)[1:]:
        for odd in [*ODD, *RAW, "self_attn", "mlp.experts", "layers.0.mlp", "layers.3.self_attn.rotary_fn"]:
            spec = {**layer, key: odd} if key in layer else {**layer, "omitted": [odd]}
            changed = {**config["condense_config"], "condensed_layers": {"3": spec}}
            open_edited(folder, {**config, "condense_config": changed})
