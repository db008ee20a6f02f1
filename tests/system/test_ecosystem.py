"""What the rest of transformers does with a model works with a condensed one, as far as with its sparse base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from cdmoe_plugin import apply_plan, unfreeze_condensed
from cdmoe_plugin.blocks import find_sparse_blocks
from tests.helpers.checkpoints import keys_on_disk
from tests.helpers.models import build, sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.states import state
from tests.helpers.tiny_models import tiny_model

TYPES = ["qwen2_moe", "deepseek", "mixtral", "qwen3_next"]  # the last mixes linear and full attention
IDS = torch.arange(3, 27).view(2, 12)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # compilers tell much of themselves


def condensed(model_type: str, some: bool = False, **overrides: Any) -> PreTrainedModel:
    """A tiny model of which all sparse layers, or the first one only, are condensed."""
    if model_type == "deepseek":
        model = build("deepseek", **{"num_experts": 8, **overrides})
    else:
        model = tiny_model(model_type, **overrides) if overrides else sparse_model(model_type)
    layers = [block.layer for block in find_sparse_blocks(model)]
    return apply_plan(model, some_plan(layers[:1] if some else layers))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def compiled(model: PreTrainedModel, backend: str = "eager") -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize("model_type", TYPES)
def test_compile_without_a_graph_break(model_type: str) -> None:
    model = condensed(model_type)
    torch.testing.assert_close(logits(compiled(model)), logits(model))


@pytest.mark.slow
def test_partly_condensed_compiles_as_its_base() -> None:
    for model in (sparse_model("qwen2_moe"), condensed("qwen2_moe", some=True)):
        model.set_experts_implementation("grouped_mm")
        torch.testing.assert_close(logits(compiled(model)), logits(model))
        model.set_experts_implementation("eager")  # loops over the experts that are hit
        with pytest.raises(Exception, match="data-dependent"):
            logits(compiled(model))


def test_compiled_training_step() -> None:
    models = [condensed("qwen2_moe").train() for _ in range(2)]
    for model, call in zip(models, (models[0], compiled(models[1], "aot_eager")), strict=True):
        unfreeze_condensed(model)
        call(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    expected, found = ({n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in models)
    assert expected.keys() == found.keys()
    assert len(expected) == 3 * 4  # three projections and a gate per token
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek", "mixtral"])
def test_static_cache(model_type: str, some: bool) -> None:
    model = condensed(model_type, some)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = mask
    expected = model.generate(IDS, **options)
    found = model.generate(IDS, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(found, expected)
    assert expected.shape == (2, 18)


@pytest.mark.parametrize("model_type", TYPES)
def test_attention_implementations(model_type: str, tmp_path: Path) -> None:
    condensed(model_type).save_pretrained(tmp_path)
    models = {
        name: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name) for name in ("eager", "sdpa")
    }
    assert {model.config._attn_implementation for model in models.values()} == {"eager", "sdpa"}
    torch.testing.assert_close(logits(models["sdpa"]), logits(models["eager"]), rtol=1e-4, atol=1e-4)
    base = type(models["eager"])._base_class
    for flag in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"):
        assert getattr(type(models["eager"]), flag) == getattr(base, flag)
    assert type(models["eager"])._can_compile_fullgraph == base._can_compile_fullgraph


@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize("model_type", TYPES)
def test_gradient_checkpointing(model_type: str, some: bool) -> None:
    model = condensed(model_type, some).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model.zero_grad()
        unfreeze_condensed(model)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek", "mixtral"])
def test_tied_and_resized_embeddings(model_type: str, some: bool, tied: bool, tmp_path: Path) -> None:
    model = condensed(model_type, some, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    before = logits(model)
    for size in (150, 110):  # more tokens than before, and fewer
        model.resize_token_embeddings(size)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert model.config.vocab_size == len(model.lm_head.weight) == len(model.model.embed_tokens.weight) == size
        model.save_pretrained(tmp_path / str(size))
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / str(size))
        assert (opened.lm_head.weight is opened.model.embed_tokens.weight) == tied
        assert ("lm_head.weight" in keys_on_disk(tmp_path / str(size))) != tied
        after = logits(opened)
        assert after.shape[-1] == size
        torch.testing.assert_close(after[..., :110], before[..., :110])
        loss = opened(input_ids=IDS, labels=IDS, use_cache=False, **_with_routers(opened, some)).loss
        torch.testing.assert_close(loss, model(input_ids=IDS, labels=IDS, **_with_routers(model, some)).loss)


def _with_routers(model: PreTrainedModel, some: bool) -> dict[str, bool]:
    """Asks for the load-balancing loss where there are routers and the architecture has one."""
    return {"output_router_logits": True} if some and hasattr(model.config, "output_router_logits") else {}


@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek", "mixtral"])
def test_reward_model(model_type: str, some: bool, tmp_path: Path) -> None:
    model = condensed(model_type, some)
    model.save_pretrained(tmp_path / "language_model")
    reward = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "language_model", num_labels=1, pad_token_id=0
    )
    decoder, expected = state(reward.model), state(model.model)
    assert all(torch.equal(decoder[name], expected[name]) for name in expected)
    reward(input_ids=IDS, labels=torch.ones(2, 1)).loss.backward()
    assert reward.score.weight.grad.abs().sum() > 0
    reward.save_pretrained(tmp_path / "reward")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert type(again).__name__.startswith("CDMoE")
    assert torch.equal(logits(again.eval()), logits(reward.eval()))
    assert logits(again).shape == (2, 1)


def test_deep_copies_are_condensed() -> None:
    model = condensed("qwen2_moe", some=True)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
