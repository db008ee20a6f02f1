"""Every sparse architecture of transformers: what its block computes, and a table of those that work.

`python -m tests.models.test_architectures` writes that table, docs/architectures.md. That condensing all experts behind
uniform routers leaves the logits as they were, is in test_condensed.py; folding, saving and opening too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeModel, Qwen2MoeSparseMoeBlock

from cdmoe_plugin import (
    CondenseConfig,
    CondensedLayer,
    CondensePlan,
    apply_plan,
    condense_pretrained,
    condensed_module_names,
    search_plan,
)
from cdmoe_plugin.blocks import SparseBlock, UnsupportedModelError, find_sparse_blocks, patched_forward
from cdmoe_plugin.blocks import block as block_room
from cdmoe_plugin.condense.fold import fold
from cdmoe_plugin.search.budget import LayerBudget
from tests.helpers.models import IDS, SEARCHABLE, TYPES, output, uniform_sparse
from tests.helpers.naive import naive_bias, naive_gated_expert, naive_glus, naive_norm, naive_own_route, naive_shared
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import ARCHITECTURES, REFUSED, available, random_ids, tiny_model

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
TABLE_VERSION = "5.23"
# Experts that work in another space than the hidden states, with and without biases of the maps there and back.
LATENT = [("nemotron_h", {"moe_latent_size": 24}), ("nemotron_h", {"moe_latent_size": 32, "mlp_bias": True})]
# What a block multiplies its routed sum with, by its config.
FACTORS: dict[str, Callable[[Any], float]] = {
    "beam": lambda c: c.routed_scaling_factor,
    "cohere2_moe": lambda c: 0.5,
    "laguna": lambda c: c.moe_routed_scaling_factor,
    "minimax_m3_vl_text": lambda c: c.routed_scaling_factor,
    "openai_privacy_filter": lambda c: c.num_experts_per_tok,
    "step3p5": lambda c: c.moe_router_scaling_factor,
}


@pytest.mark.parametrize(("model_type", "overrides"), [*((name, {}) for name in TYPES), *LATENT])
@torch.no_grad()
def test_block_with_its_own_routing(model_type: str, overrides: dict[str, Any]) -> None:
    """A block's output, what the package says that it is, and the sum token by token from raw weights in float64."""
    model = tiny_model(model_type, **overrides)
    double = copy.deepcopy(model).double().base_model
    factor = FACTORS.get(model_type, lambda c: 1.0)(model.config)
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2))
    for block in find_sparse_blocks(model):
        glu, shared_glu = naive_glus(model.config, block.layer)
        raw, owner = double.get_submodule(block.path), double.get_submodule(block.path.rpartition(".")[0])
        calls: list[list[Any]] = []
        handle = block.experts.register_forward_pre_hook(
            lambda _, args, kwargs, calls=calls: calls.append([*args, *kwargs.values()]), with_kwargs=True
        )
        with block.recording() as record:
            output = block.run(x)[0]
        handle.remove()

        own = [naive_own_route(raw, token.double()) for token in x[0]]
        if None in own:
            _, index, weights = calls[0]
            index, weights = (weights, index) if index.is_floating_point() else (index, weights)
            own = [list(zip(i.tolist(), w.tolist(), strict=True)) for i, w in zip(index, weights, strict=True)]
        plain = naive_shared(raw, owner, x[0].double(), shared_glu) + naive_bias(raw)
        for token, choice in enumerate(own):
            for expert, weight in choice:  # a table of token ids may name one twice
                plain[token] += naive_gated_expert(raw, expert, factor * weight, x[0, token].double(), glu)
        torch.testing.assert_close(output.double(), naive_norm(raw, plain), rtol=1e-4, atol=1e-5)

        seen = block.shared_output(x[0])
        for token, (chosen, gates) in enumerate(zip(*record.routing, strict=True)):
            outputs = block.expert_outputs(x[0, token : token + 1], chosen.tolist(), gates)[:, 0]
            seen[token] += (outputs * block.output_factors(gates)[:, None]).sum(0)
        torch.testing.assert_close(seen.double(), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "overrides"), [*((name, {}) for name in ("gpt_oss", "nemotron_h", "dbrx", "llama4_text")), *LATENT]
)
def test_experts_of_a_large_layer_compute_a_few_at_a_time(
    model_type: str, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = find_sparse_blocks(tiny_model(model_type, **overrides))[-1]
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    gates = torch.rand(8, generator=torch.Generator().manual_seed(1))
    whole = block.expert_outputs(x, gates=gates)
    elements = block.expert_weights().up[0].numel()
    monkeypatch.setattr(block_room, "_WEIGHT_ELEMENTS", {"cpu": 3 * elements})  # three, three and two
    torch.testing.assert_close(block.expert_outputs(x, gates=gates), whole)
    some = [5, 0, 7, 2]
    torch.testing.assert_close(block.expert_outputs(x, some, gates[some]), whole[some])


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in SEARCHABLE])
@torch.no_grad()
def test_uniform_router_without_a_search(model_type: str, tmp_path: Path) -> None:
    """All experts of all layers give the original output; test_condensed.py has those that can be searched."""
    model = uniform_sparse(model_type)
    before, blocks = output(model), find_sparse_blocks(model)
    with ExitStack() as stack:
        recorded = [stack.enter_context(block.recording()) for block in blocks]
        output(model)
        routes = [record.routing for record in recorded]
    layers = []
    for block, calls in zip(blocks, routes, strict=True):
        gates = dict(zip(calls.experts[0].tolist(), calls.weights[0].tolist(), strict=True))
        layers.append(CondensedLayer(block.layer, list(gates), list(gates.values())))
    condensed = apply_plan(model, CondensePlan(layers))
    assert (output(condensed) - before).abs().max() < 1e-5 * before.abs().max()
    condensed.save_pretrained(tmp_path)
    torch.testing.assert_close(output(type(condensed).from_pretrained(tmp_path)), output(condensed))


def test_a_decoder_that_is_no_chain_of_layers_is_refused() -> None:
    class Bypassed(Qwen2MoeModel):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            found = super().forward(input_ids=input_ids, **kwargs)
            found.last_hidden_state = found.last_hidden_state + self.embed_tokens(input_ids)
            return found

    model = tiny_model("qwen2_moe")
    model.model.__class__ = Bypassed
    with pytest.raises(UnsupportedModelError, match="'qwen2_moe' can't be searched layer by layer"):
        search_plan(model, CondenseConfig(num_layers=1, num_experts=1), calibration=IDS)


def test_a_block_that_asks_for_more_is_refused() -> None:
    class Asking(Qwen2MoeSparseMoeBlock):
        def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states + positions)

    model = tiny_model("qwen2_moe")
    model.model.layers[1].mlp.__class__ = Asking
    with pytest.raises(UnsupportedModelError, match=r"layer 1 .*needs more than hidden states .*'positions'"):
        find_sparse_blocks(model)


@pytest.mark.parametrize("overrides", [overrides for _, overrides in LATENT])
def test_experts_in_latent_space(overrides: dict[str, Any], tmp_path: Path) -> None:
    """As test_condensed.py and the test above do for every model type: uniform routers, saving, opening from disk."""
    model = uniform_sparse("nemotron_h", **overrides)
    before = output(model)
    model.save_pretrained(tmp_path / "sparse")
    plan = search_plan(model, CondenseConfig(num_layers=3, num_experts=4), calibration=IDS)
    assert all(abs(row.expert_scores[-1]) < 1e-3 * row.expert_scores[0] for row in plan.layers)
    apply_plan(model, plan)
    assert (output(model) - before).abs().max() < 1e-5 * before.abs().max()
    model.save_pretrained(tmp_path / "condensed")
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "condensed")), output(model))
    read = condense_pretrained(tmp_path / "sparse", plan=plan)
    assert not differing(state(read), state(model))


def test_cost_of_experts_in_latent_space() -> None:
    """What a budget counts is what a kept expert adds to the condensed layer: matrices of the hidden size."""
    model = tiny_model("nemotron_h", moe_latent_size=24, dtype=torch.bfloat16)
    config = CondenseConfig(layers=[1], num_experts="auto", expert_budget="1KB")
    budget = LayerBudget.of(config, find_sparse_blocks(model))
    assert budget is not None
    assert budget.costs == {1: 2 * 16 * 32 * 2}
    mlps = [fold(find_sparse_blocks(model)[0], list(range(k)), [1.0] * k) for k in (0, 1)]
    sizes = [sum(p.numel() * p.element_size() for p in mlp.parameters()) for mlp in mlps]
    assert sizes[1] - sizes[0] == budget.costs[1]


def test_experts_of_the_decoder_layer_are_not_split_over_processes() -> None:
    """Condensed MLPs stand where other layers have experts, for which the base's plan has other ways of splitting."""
    model = tiny_model("gemma4_text")
    before = dict(model.config.base_model_tp_plan)
    plan = apply_plan(model, CondensePlan([CondensedLayer(2, [1], [0.5])])).config.base_model_tp_plan
    assert plan == {name: how for name, how in before.items() if not name.startswith("layers.*.experts")}
    assert plan != before


def test_layers_that_read_what_others_leave() -> None:
    model = tiny_model("gemma4_text", num_kv_shared_layers=2, layer_types=("full_attention",))
    with pytest.raises(UnsupportedModelError, match=r"'gemma4_text' can't be searched.*store in `shared_kv_states`"):
        search_plan(model, CondenseConfig(num_layers=1, num_experts=1), calibration=IDS)
    assert output(apply_plan(model, CondensePlan([CondensedLayer(2, [1], [0.5])]))).isfinite().all()


def test_a_mixture_of_attentions_is_left_alone() -> None:
    model = tiny_model("jetmoe")
    before = {name: tensor for name, tensor in state(model).items() if ".self_attention." in name}
    assert [block.path for block in find_sparse_blocks(model)] == [f"layers.{i}.mlp" for i in range(4)]
    condensed = apply_plan(model, CondensePlan([CondensedLayer(i, [2], [0.5]) for i in range(4)]))
    assert any(".experts.input_linear" in name for name in before)
    assert not differing(before, {name: tensor for name, tensor in state(condensed).items() if name in before})
    assert not [name for name in state(condensed) if ".mlp.router." in name]


def test_experts_that_see_something_else_are_refused() -> None:
    model = tiny_model("nemotron_h", moe_latent_size=16)
    model.model.layers[1].mixer.experts.register_forward_pre_hook(lambda _, args: (args[0].tanh(), *args[1:]))
    with pytest.raises(UnsupportedModelError, match="its experts do not have the inputs of the block"):
        find_sparse_blocks(model)


@pytest.mark.parametrize("refit", ["down_proj", "distill"])
@pytest.mark.parametrize(
    "model_type",
    [
        *("axk1", "gpt_oss", "jetmoe", "llama4_text", "nemotron_h"),
        *filter(available, ("deepseek_v4", "glm5_next_text", "hy_v4", "inkling2_text")),
    ],
)
def test_refit(model_type: str, refit: str) -> None:
    """What is fitted is the MLP that stands in the layer: biases, bounds, norms, router scores, residual streams."""
    sequences = random_ids(20, 24)
    config = CondenseConfig(layers=[1, 3], num_experts=2, refit=refit, refit_steps=30)
    model = condense_pretrained(tiny_model(model_type), config, calibration=sequences)
    errors = model.config.condense_config["refit_errors"]
    assert all(after <= before for before, after in errors.values())
    assert any(after < before for before, after in errors.values())


@pytest.mark.parametrize(("model_type", "block"), [("gpt_oss", "mlp"), ("llama4_text", "feed_forward")])
@torch.no_grad()
def test_a_layer_whose_block_returned_scores_is_trimmed(model_type: str, block: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    with patched_forward(getattr(model.model.layers[1], block), lambda x: (torch.zeros_like(x), None)):
        expected = output(model)
    plan = search_plan(model, CondenseConfig(layers=[1], form="trim_layer"), calibration=IDS)
    apply_plan(model, plan).save_pretrained(tmp_path)
    assert torch.equal(output(model), expected)
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize(
    ("model_type", "layer", "parts"),
    [("gpt_oss", "layers.2.mlp", ("gate", "up", "down")), ("nemotron_h", "layers.3.mixer", ("up", "down"))],
)
def test_adapters_find_the_projections(model_type: str, layer: str, parts: tuple[str, ...]) -> None:
    number = int(layer.split(".")[1])
    model = apply_plan(tiny_model(model_type), CondensePlan([CondensedLayer(number, [1, 5], [0.5, 0.25])]))
    assert condensed_module_names(model) == [f"model.{layer}.{part}_proj" for part in parts]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"form": "magic"}, "unknown form 'magic'"),
        ({"form": "clamped"}, "limit"),
        ({"form": "plain", "limit": 1}, "limit"),
    ],
)
def test_activations_that_are_not_known(form: dict[str, Any], message: str, tmp_path: Path) -> None:
    condensed = apply_plan(tiny_model("gpt_oss"), CondensePlan([CondensedLayer(2, [1], [0.5])]))
    condensed.config.condense_config["condensed_layers"]["2"]["gated_activation"] = form
    with pytest.raises(ValueError, match=f"can't be understood for decoder layer 2.*{message}"):
        type(condensed)._from_config(condensed.config)


# --- the table ---


def shared_expert(block: SparseBlock) -> str:
    if block.shared is None:
        return "no"
    return "with a gate per token" if block.shared_gate is not None else "yes"


def experts(block: SparseBlock) -> str:
    """How they differ from `act(gate) * up` without biases, and from the shared expert."""
    forms = [form.get("form", "plain") for form in (block.activation, block.shared_activation)]
    words = [] if forms[0] == "plain" else [forms[0]]
    if block.shared is not None and block.shared_activation != block.activation:
        words.append(f"the shared one {forms[1]}" if forms[0] != forms[1] else "the shared one with another limit")
    return ", ".join([*words, *(["with biases"] if block.expert_weights().biased else [])])


def row(model_type: str) -> list[str]:
    """Type, class, shared expert, kind of experts, and why it can't be condensed (or that it can)."""
    arch = ARCHITECTURES.get(model_type) or REFUSED[model_type]
    try:
        block = find_sparse_blocks(tiny_model(model_type))[0]
    except UnsupportedModelError as error:
        reason = re.sub(r" ?\(relative difference [^)]*\)", "", str(error)).partition("can't be condensed: ")[2]
        return [model_type, arch.model, "", "", f"refused: {(reason or str(error)).rstrip('.')}"]
    return [model_type, arch.model, shared_expert(block), experts(block), "works"]


def table() -> str:
    """The text of docs/architectures.md."""
    rows = [row(model_type) for model_type in (*ARCHITECTURES, *REFUSED)]
    working = sorted(cells for cells in rows if cells[-1].startswith("works"))
    refused = sorted(cells for cells in rows if not cells[-1].startswith("works"))
    lines = [
        "# Architectures",
        "",
        f"Sparse decoders of transformers {TABLE_VERSION}, each tried on a tiny model with random weights:",
        f"{len(working)} can be condensed, {len(refused)} are refused with the reason.",
        "`python -m tests.models.test_architectures` writes this file; a test fails when it is out of date.",
        "",
        "| model type | class | shared expert | experts | condensed |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(cells)} |" for cells in (*working, *refused)),
    ]
    return "\n".join(lines) + "\n"


def test_the_table_is_up_to_date() -> None:
    if not transformers.__version__.startswith(f"{TABLE_VERSION}."):
        pytest.skip(f"the table is that of transformers {TABLE_VERSION}")
    assert all(available(model_type) for model_type in (*ARCHITECTURES, *REFUSED))
    assert TABLE.read_text(encoding="utf-8") == table(), "run `python -m tests.models.test_architectures`"


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(), encoding="utf-8")
