"""`--model cdmoe` in lm-eval: answers as with `--model hf`, plans, quantisation, adapters, size and speed, errors."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from cdmoe_plugin import CondenseAdapterConfig, CondensePlan, apply_plan, condensed_module_names
from cdmoe_plugin.integrations.lm_eval_model import CDMoELM
from cdmoe_plugin.integrations.measure import generation_speed, peak_memory, weight_bytes
from tests.helpers.lm_eval_cases import ROWS, TASKS, Case, answers, evaluate, make_case
from tests.helpers.states import differing


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("lm_eval"))


@pytest.fixture(scope="module")
def by_hf(case: Case) -> dict[str, Any]:
    return answers(evaluate(case, "hf", pretrained=case.condensed, device="cpu"))


def opened(**arguments: Any) -> CDMoELM:
    return CDMoELM(**{"device": "cpu", **arguments})


def outputs(lm: HFLM) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.arange(3, 27).reshape(2, 12)).logits


# --- what is evaluated ---


def test_a_condensed_checkpoint_answers_as_with_hf(case: Case, by_hf: dict[str, Any]) -> None:
    results = evaluate(case, "cdmoe", pretrained=case.condensed)  # no device: the CPU, where there is no GPU
    assert answers(results) == by_hf
    assert [len(results["samples"][task]) for task in TASKS] == [ROWS, ROWS]
    assert len({repr(resps) for resps in by_hf["samples"]["tiny_choice"]}) == ROWS
    in_batches = answers(evaluate(case, "cdmoe", pretrained=case.condensed, batch_size="auto"))
    assert in_batches["scores"] == by_hf["scores"]


def test_a_base_model_with_a_plan_is_the_condensed_checkpoint(case: Case, by_hf: dict[str, Any]) -> None:
    for plan in (case.plan_file, case.condensed, case.plan):
        lm = opened(pretrained=str(case.base), plan=plan)
        assert type(lm.model).__name__ == "CDMoEQwen2MoeForCausalLM"
        assert lm.model.condense_plan == case.plan
    assert answers(evaluate(case, "cdmoe", pretrained=case.base, plan=case.plan_file)) == by_hf


@pytest.mark.parametrize("budget", [{"num_layers": 2}, {"num_experts": 1}, {"num_layers": 1, "num_experts": 0}])
def test_smaller_budgets_are_those_of_truncate(case: Case, budget: dict[str, int]) -> None:
    wanted = apply_plan(AutoModelForCausalLM.from_pretrained(case.base), case.plan.truncate(**budget))
    model = opened(pretrained=case.base, plan=case.plan_file, **budget).model
    assert model.condense_plan == case.plan.truncate(**budget)
    assert differing(wanted.state_dict(), model.state_dict()) == []


def test_a_base_model_alone_is_evaluated_as_it_is(case: Case, by_hf: dict[str, Any]) -> None:
    results = evaluate(case, "cdmoe", pretrained=case.base)
    assert answers(results) == answers(evaluate(case, "hf", pretrained=case.base, device="cpu"))
    assert answers(results)["samples"] != by_hf["samples"]
    assert results["config"]["condensed_layers"] == []


def test_arguments_of_hf_work_with_a_plan(case: Case, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(case.condensed)
    adapter = get_peft_model(model, LoraConfig(target_modules=condensed_module_names(model), init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    arguments = {"peft": str(tmp_path / "adapter"), "attn_implementation": "eager"}
    lm = opened(pretrained=str(case.base), plan=case.plan_file, **arguments)
    assert lm.model.config._attn_implementation == "eager"
    wanted = outputs(HFLM(str(case.condensed), device="cpu", **arguments))
    assert torch.equal(outputs(lm), wanted)
    assert not torch.equal(outputs(opened(pretrained=str(case.condensed))), wanted)

    half = opened(pretrained=str(case.base), plan=case.plan_file, dtype="bfloat16").model
    assert half.dtype == torch.bfloat16
    sparse = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.bfloat16)
    assert differing(apply_plan(sparse, case.plan).state_dict(), half.state_dict()) == []


def test_a_condense_adapter(case: Case, by_hf: dict[str, Any], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(case.base)
    adapter = get_peft_model(base, CondenseAdapterConfig(plan=case.plan, task_type="CAUSAL_LM"))
    adapter.save_pretrained(tmp_path / "folded")
    results = evaluate(case, "cdmoe", pretrained=case.base, peft=tmp_path / "folded")
    assert answers(results) == by_hf
    assert results["config"]["condensed_layers"] == sorted(layer.layer for layer in case.plan.layers)

    for parameter in adapter.parameters():
        parameter.data *= 1.5 if parameter.requires_grad else 1.0
    adapter.save_pretrained(tmp_path / "trained")
    lm = opened(pretrained=str(case.base), peft=str(tmp_path / "trained"))
    with torch.no_grad():
        wanted = adapter(torch.arange(3, 27).reshape(2, 12)).logits
    assert torch.equal(outputs(lm), wanted)
    small = opened(pretrained=str(case.base), plan=str(tmp_path / "trained"))
    assert type(small.model).__name__ == "CDMoEQwen2MoeForCausalLM"
    assert torch.equal(outputs(small), wanted)
    with pytest.raises(ValueError, match="weights for its whole plan, which `num_layers`"):
        opened(pretrained=str(case.base), plan=str(tmp_path / "trained"), num_layers=1)


def test_a_delta_is_added_before_condensing(case: Case, tmp_path: Path) -> None:
    sparse = AutoModelForCausalLM.from_pretrained(case.base)
    shutil.copytree(case.base, tmp_path / "delta")
    with torch.no_grad():
        delta = AutoModelForCausalLM.from_pretrained(case.base)
        for mine, other in zip(sparse.parameters(), delta.parameters(), strict=True):
            other.copy_(0.1 * torch.randn(other.shape, generator=torch.Generator().manual_seed(len(other))))
            mine.add_(other)
    delta.save_pretrained(tmp_path / "delta")
    lm = opened(pretrained=case.base, plan=case.plan, delta=str(tmp_path / "delta"))
    with torch.no_grad():
        wanted = apply_plan(sparse, case.plan)(torch.arange(3, 27).reshape(2, 12)).logits
    torch.testing.assert_close(outputs(lm), wanted)


@pytest.mark.slow
def test_a_plan_and_quantisation(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden": 64, "expert_width": 64, "shared_width": 64, "dense_width": 64, "head_width": 16}
    wide = make_case(tmp_path_factory.mktemp("wide"), **sizes)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lm = opened(pretrained=wide.base, plan=wide.plan_file, load_in_8bit=True, attn_implementation="eager")
    assert lm.model.config._attn_implementation == "eager"
    assert list(tmp_path.iterdir()) == []
    assert type(lm.model.model.layers[1].mlp.gate_proj).__name__ == "Linear8bitLt"
    assert type(lm.model.model.layers[1].mlp).__name__ == "CondensedMLP"
    assert lm.model.name_or_path == str(wide.base)
    config = BitsAndBytesConfig(load_in_8bit=True)
    wanted = AutoModelForCausalLM.from_pretrained(wide.condensed, quantization_config=config)
    assert differing(wanted.state_dict(), lm.model.state_dict()) == []
    same = opened(pretrained=wide.condensed, quantization_config=config, attn_implementation="eager")
    assert torch.equal(outputs(lm), outputs(same))

    four_bit = opened(pretrained=wide.base, plan=wide.plan, quantization_config={"load_in_4bit": True})
    assert type(four_bit.model.model.layers[1].mlp.up_proj).__name__ == "Linear4bit"
    # A weight takes half a byte, and the scale of 64 of them four bytes.
    mlp = four_bit.model.model.layers[1].mlp.up_proj
    weights = mlp.in_features * mlp.out_features
    assert weights // 2 + weights // 64 * 4 <= weight_bytes(mlp) < weights


# --- size, memory, speed ---


def test_results_say_size_memory_and_speed(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    monitored = logging.getLogger("lm_eval.models.cdmoe")
    monitored.addHandler(caplog.handler)  # lm-eval's loggers do not propagate once its command line was used
    with caplog.at_level(logging.INFO, monitored.name):
        config = evaluate(case, "cdmoe", pretrained=case.condensed)["config"]
    monitored.removeHandler(caplog.handler)
    model = AutoModelForCausalLM.from_pretrained(case.condensed)
    assert config["model_num_parameters"] == model.num_parameters()
    assert config["model_weight_bytes"] == 4 * model.num_parameters()
    assert config["condensed_layers"] == [1, 2, 3]
    assert config["peak_memory_of"] == "RAM of this process since it started"
    assert 2**27 < config["peak_memory_bytes"] < 2**34
    assert config["generation"].pop("tokens_per_second") > 1
    assert config["generation"] == {"batch_size": 1, "prompt_tokens": 32, "new_tokens": 32, "runs": 3}
    assert f"| {model.num_parameters():,} " in caplog.text
    json.dumps(config["generation"])


def test_peak_memory_has_a_peak() -> None:
    before = peak_memory(torch.nn.Linear(1, 1))[0]
    assert before is not None
    block = torch.ones(2**27)  # half a GiB
    del block
    after = peak_memory(torch.nn.Linear(1, 1))[0]
    assert after is not None
    assert after > 2**29
    assert after >= before


def test_speed_counts_the_tokens_that_are_generated(case: Case) -> None:
    model = AutoModelForCausalLM.from_pretrained(case.condensed)
    torch.nn.init.zeros_(model.lm_head.weight)  # all tokens alike: the first one wins
    model.generation_config.eos_token_id = 0  # and would end it at once
    calls = []

    def slow(module: Any, args: Any, output: Any) -> None:
        calls.append(time.sleep(0.01))

    model.register_forward_hook(slow)
    random_state = torch.get_rng_state()
    speed = generation_speed(model, torch.device("cpu"), vocabulary_size=100, max_length=128)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(calls) == 4 + 3 * speed["new_tokens"]
    assert 1 < speed["tokens_per_second"] < 1 / 0.01


def test_tied_weights_count_once() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False))
    assert weight_bytes(model) == 2 * 8 * 4 * 4
    model[1].weight = model[0].weight
    assert weight_bytes(model.half()) == 8 * 4 * 2


def test_results_survive_where_speed_can_not_be_measured(case: Case) -> None:
    lm = opened(pretrained=case.condensed, max_length=1)
    info = lm.get_model_info()
    assert info["generation"]["tokens_per_second"] is None
    assert "no room" in info["generation"]["error"]
    assert info["model_weight_bytes"] > 0


# --- errors, from a checkpoint without weights: they come before these are read ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 2}, r"`num_layers=2` needs a plan.*`plan=`"),
        ({"num_experts": 0}, r"`num_experts=0` needs a plan.*`plan=`"),
        ({"plan": "missing.json"}, r"`plan=missing.json`.*no file missing.json"),
        ({"plan": "{tasks}"}, r"`plan=.*tasks`.*no file .*condense_plan.json"),
        ({"plan": "{base}/config.json"}, r"config.json is not a valid condense plan"),
        ({"plan": ""}, "`plan` is empty"),
        ({"plan": 3}, "`plan` should be a path"),
        ({"plan": "{plan}", "num_layers": 4}, "`num_layers` should be between 1 and the plan's 3, but is 4"),
        ({"plan": "{plan}", "num_experts": "many"}, "`num_experts` should be between 0 and the plan's 3.*'many'"),
        ({"plan": "{plan}", "gguf_file": "x.gguf"}, "`gguf_file=x.gguf` can't be combined with `plan`"),
        ({"plan": "{plan}", "tp_plan": "auto"}, "`tp_plan=auto` can't be combined with `plan`"),
        ({"plan": "{plan}", "pretrained": "{condensed}"}, r"`pretrained=.*` is condensed already .*\[1, 2, 3\]"),
        ({"load_in_8bit": True, "quantization_config": {"load_in_8bit": True}}, "`load_in_8bit` were both given"),
        ({"bnb_4bit_quant_type": "nf4"}, "`bnb_4bit_quant_type` does nothing without"),
    ],
)
def test_bad_arguments(case: Case, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    for name in ("base", "condensed"):
        shutil.copytree(getattr(case, name), tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    places = {"tasks": case.tasks, "plan": case.plan_file, **{n: tmp_path / n for n in ("base", "condensed")}}
    texts = {n: v.format(**places) if isinstance(v, str) else v for n, v in arguments.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        opened(**{"pretrained": str(tmp_path / "base"), **texts})


def test_other_errors(case: Case, tmp_path: Path) -> None:
    for plan in (None, case.plan):
        with pytest.raises(ValueError, match=r"unknown argument `num_layer=3`.*Did you mean `num_layers`"):
            opened(pretrained=case.base, plan=plan, num_layer=3)
    other = CondensePlan.from_dict(case.plan.to_dict() | {"model": {**case.plan.to_dict()["model"], "hidden_size": 8}})
    with pytest.raises(ValueError, match="made for another model: its hidden_size is 8"):
        opened(pretrained=case.base, plan=other)
    model = AutoModelForCausalLM.from_pretrained(case.base)
    with pytest.raises(ValueError, match="`plan` is for checkpoints"):
        opened(pretrained=model, plan=case.plan)
    with pytest.raises(ValueError, match="can't be quantised any more"):
        opened(pretrained=model, load_in_4bit=True)
