"""Decoder layers that can't be dropped, because a config can't say what remains; how a config's fields may be read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeDecoderLayer

from cdmoe_plugin import CondenseConfig, apply_plan, condense_pretrained, search_plan
from cdmoe_plugin.blocks import UnsupportedModelError
from cdmoe_plugin.condense.forms.fewer_layers import readings, without_layers
from cdmoe_plugin.estimate import dry_run
from tests.helpers.models import IDS
from tests.helpers.states import differing, state_of
from tests.helpers.tiny_models import tiny_model
from tests.helpers.trimming import by_hand, first_output, trim_plan


def every_other(**changes: Any) -> PreTrainedModel:
    """Sparse are 1, 3 and 5, by a period in the config."""
    return tiny_model("qwen2_moe", num_layers=6, decoder_sparse_step=2, mlp_only_layers=[], **changes)


@pytest.mark.parametrize("dropped", [[1], [3], [1, 5], [1, 3, 5]])
def test_a_period_that_does_not_survive(dropped: list[int], tmp_path: Path) -> None:
    model = every_other()
    before = state_of(model)
    match = rf"without its decoder layers \{dropped}: its config can't describe .* (Qwen2MoeMLP|SparseMoeBlock)"
    with pytest.raises(UnsupportedModelError, match=match):
        apply_plan(model, trim_plan("trim_block", dropped))
    after = state_of(model)
    assert not differing(before[0], after[0])
    assert before[1] == after[1]
    model.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()  # nothing is read
    for how in (
        {"plan": trim_plan("trim_block", dropped)},
        {"config": CondenseConfig(layers=dropped, form="trim_block")},
    ):
        with pytest.raises(UnsupportedModelError, match="its config can't describe"):
            condense_pretrained(tmp_path, **how)
        with pytest.raises(UnsupportedModelError, match="its config can't describe"):
            dry_run(tmp_path, next(iter(how.values())))


def test_the_end_of_a_period_can_go() -> None:
    model = every_other()
    expected = by_hand(model, "trim_block", [5], IDS)
    torch.testing.assert_close(first_output(apply_plan(model, trim_plan("trim_block", [5])), IDS), expected)
    with pytest.raises(UnsupportedModelError, match="Choose layers that can be dropped with `layers`"):
        search_plan(every_other(), CondenseConfig(1, form="trim_block"), calibration=IDS)


def test_no_layer_left() -> None:
    with pytest.raises(UnsupportedModelError, match="no layer would remain"):
        search_plan(tiny_model("mixtral"), CondenseConfig(4, form="trim_block"), calibration=IDS)
    with pytest.raises(UnsupportedModelError, match="no layer would remain"):
        apply_plan(tiny_model("mixtral"), trim_plan("trim_block", [0, 1, 2, 3]))
    with pytest.raises(UnsupportedModelError, match="the remaining layers do not run"):
        apply_plan(tiny_model("qwen3_next", num_layers=3), trim_plan("trim_block", [1]))


def test_what_depends_on_its_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No attribute and no shape tells; what the remaining layers compute does."""
    forward = Qwen2MoeDecoderLayer.forward

    def scaled(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return forward(self, hidden_states * (1 + self.self_attn.layer_idx), **kwargs)

    monkeypatch.setattr(Qwen2MoeDecoderLayer, "forward", scaled)
    model = tiny_model("qwen2_moe")
    before, output = state_of(model), first_output(model, IDS)
    with pytest.raises(UnsupportedModelError, match="the remaining layers compute something else"):
        apply_plan(model, trim_plan("trim_block", [1]))
    after = state_of(model)
    assert not differing(before[0], after[0])
    assert before[1] == after[1]
    torch.testing.assert_close(first_output(model, IDS), output, rtol=0, atol=0)


def test_a_buffer_that_depends_on_its_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not saved: whoever opens the checkpoint computes another one."""
    init = Qwen2MoeDecoderLayer.__init__

    def with_buffer(self: Any, config: Any, layer_idx: int) -> None:
        init(self, config, layer_idx)
        self.register_buffer("decay", torch.tensor([0.5**layer_idx]), persistent=False)

    monkeypatch.setattr(Qwen2MoeDecoderLayer, "__init__", with_buffer)
    model = tiny_model("qwen2_moe")
    with pytest.raises(UnsupportedModelError, match=r"buffers \['decay'\] of model.layers.1 would have other values"):
        apply_plan(model, trim_plan("trim_block", [1]))
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
    assert len(apply_plan(model, trim_plan("trim_block", [3])).model.layers) == 3


PASSING = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12"),
    MemoryError(),
    KeyboardInterrupt(),
    NameError("a bug"),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: f"{type(error).__name__}")
@pytest.mark.parametrize("place", ["__init__", "forward"])
def test_other_errors_are_no_refusals(place: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose layers are built again, or run without some, raises what is no answer to either."""
    model = tiny_model("qwen2_moe")
    before, method = state_of(model), getattr(Qwen2MoeDecoderLayer, place)

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if place == "__init__" or len(model.model.layers) == 3:
            raise error
        return method(self, *args, **kwargs)

    monkeypatch.setattr(Qwen2MoeDecoderLayer, place, failing)
    with pytest.raises(type(error)) as caught:
        apply_plan(model, trim_plan("trim_block", [1]))
    assert caught.value is error
    after = state_of(model)
    assert not differing(before[0], after[0])
    assert before[1] == after[1]


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("no"), StrictDataclassError("no")])
def test_configs_that_refuse_are_refusals(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model, init = tiny_model("qwen2_moe"), Qwen2MoeDecoderLayer.__init__

    def refusing(self: Any, config: Any, layer_idx: int) -> None:
        if config.num_hidden_layers == 3:
            raise error
        init(self, config, layer_idx)

    monkeypatch.setattr(Qwen2MoeDecoderLayer, "__init__", refusing)
    with pytest.raises(UnsupportedModelError, match=r"can't describe the remaining layers \(it is refused: no\)"):
        apply_plan(model, trim_plan("trim_block", [1]))


@pytest.mark.parametrize(
    ("name", "value", "first"),
    [
        ("layer_types", ["a", "b", "c", "d"], ["a", "c", "d"]),
        ("mlp_only_layers", [0, 2], [0, 1]),
        ("mlp_only_layers", [1], []),
        ("moe_layers", [0, 1, 2, 3], [0, 1, 2]),
        ("no_rope_layers", [1, 0, 1, 1], [1, 1, 1]),
        ("kv_source_layers", [0, 0, 2, 2], [0, 2, 2]),
        ("first_k_dense_replace", 1, 1),
        ("eos_token_id", [1, 2], [1, 2]),
        ("eos_token_id", [5, 6, 7, 8], [5, 6, 7, 8]),
        ("num_experts", 3, 3),
        ("tie_layers", True, True),
    ],
)
def test_readings(name: str, value: Any, first: Any) -> None:
    found = readings(name, copy.deepcopy(value), [0, 2, 3], 4)
    assert found[0] == first
    assert [0, 1, 1] in found or name != "kv_source_layers"
    assert found == [reading for i, reading in enumerate(found) if reading not in found[:i]]


def test_two_fields_that_move() -> None:
    """Without its first layer, both of jamba's patterns begin one layer earlier."""
    model = tiny_model("jamba", num_layers=6)
    remaining = without_layers(model, "layers", [0])
    assert remaining.fields == {"attn_layer_offset": 0, "expert_layer_offset": 0, "num_hidden_layers": 5}


def test_dense_layers_after_sparse_ones_are_renumbered() -> None:
    model = tiny_model("qwen2_moe", num_layers=6, mlp_only_layers=[0, 3])
    expected = by_hand(model, "trim_block", [1, 4], IDS)
    apply_plan(model, trim_plan("trim_block", [1, 4]))
    assert model.config.mlp_only_layers == [0, 2]
    torch.testing.assert_close(first_output(model, IDS), expected, rtol=1e-5, atol=1e-5)
