"""Condense adapters in training: what changes, in which dtype, from which reference, and after a restart."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from cdmoe_plugin import CondenseAdapterConfig, CondensePlan, apply_plan
from tests.helpers.models import output
from tests.helpers.plans import some_plan
from tests.helpers.quantized import WIDE, distance, quantisation, quantised, with_weights_by_hand
from tests.helpers.recovery import lm_rows, word_tokenizer
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import tiny_model

ALL = some_plan([1, 2, 3])
SOME = some_plan([1, 3])
TEXTS = [row["text"] for row in lm_rows()]
PAIRS = [{"prompt": a[:12], "chosen": a[12:60], "rejected": b[12:60]} for a, b in pairwise(TEXTS)]
SETTINGS: dict[str, Any] = {
    **{"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True},
    **{"bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint and a folded adapter of all its sparse layers."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny_model("qwen2_moe", max_positions=256).save_pretrained(folder / "base")
    get_peft_model(open_base(folder), config_of(ALL)).save_pretrained(folder / "adapter")
    return folder


def open_base(place: Path, **kwargs: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(place / "base", **kwargs)


def config_of(plan: CondensePlan) -> CondenseAdapterConfig:
    return CondenseAdapterConfig(plan=plan, task_type="CAUSAL_LM")


def rows(kind: str) -> Dataset:
    """Data of TRL's trainers."""
    if kind == "KTO":
        labelled = [(row["prompt"], row[side], side == "chosen") for row in PAIRS for side in ("chosen", "rejected")]
        return Dataset.from_list([{"prompt": p, "completion": c, "label": good} for p, c, good in labelled])
    return Dataset.from_list(
        {"SFT": [{"text": text} for text in TEXTS], "GRPO": [{"prompt": t} for t in TEXTS]}.get(kind, PAIRS)
    )


def different_words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


TRAINERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "SFT": (SFTTrainer, SFTConfig, {"max_length": 32}),
    "DPO": (DPOTrainer, DPOConfig, {}),
    "KTO": (KTOTrainer, KTOConfig, {}),
    "GRPO": (GRPOTrainer, GRPOConfig, {"num_generations": 2, "max_completion_length": 6, "beta": 0.04}),
}


def make_trainer(kind: str, model: Any, folder: Path, peft_config: Any = None, **settings: Any) -> Any:
    trainer, config, own = TRAINERS[kind]
    more = {"reward_funcs": different_words} if kind == "GRPO" else {}
    if "eval_strategy" in settings:
        more["eval_dataset"] = rows(kind).select(range(8))
    torch.manual_seed(0)
    return trainer(
        model,
        args=config(str(folder), **{**SETTINGS, **own, **settings}),
        train_dataset=rows(kind),
        processing_class=word_tokenizer(),
        peft_config=peft_config,
        **more,
    )


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("kind", TRAINERS)
def test_only_condensed_weights_change(kind: str, place: Path, tmp_path: Path) -> None:
    """All of them do, in float32 beside a base in bfloat16; the reference is the sparse model."""
    trainer = make_trainer(kind, open_base(place, dtype="bfloat16"), tmp_path, config_of(ALL))
    before = state(trainer.model)
    trainer.train()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert set(differing(before, state(trainer.model))) == trained
    assert trained == {name for name in before if ".cdmoe_mlp.default." in name}
    assert {before[name].dtype for name in trained} == {torch.float32}
    assert {p.dtype for name, p in before.items() if name not in trained and "rotary" not in name} == {torch.bfloat16}
    if kind == "DPO":  # the sparse model prefers something else
        assert logged(trainer, "rewards/margins")[0] != 0
    if kind in ("KTO", "GRPO"):
        assert logged(trainer, "kl")[0] > 0
    trainer.save_model(str(tmp_path / "result"))
    merged = trainer.model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    opened = PeftModel.from_pretrained(open_base(place, dtype="bfloat16"), tmp_path / "result")
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.bfloat16}
    assert torch.equal(output(opened.get_base_model()), output(merged.eval()))


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO"])
def test_the_condensed_model_as_reference(kind: str, place: Path, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(open_base(place), place / "adapter", is_trainable=True)
    trainer = make_trainer(kind, model, tmp_path)
    before = state(trainer.model)
    trainer.train()
    assert set(trainer.model.peft_config) == {"default", "ref"}
    assert logged(trainer, "kl" if kind == "GRPO" else "rewards/margins")[0] == 0
    assert {".default." in name for name in differing(before, state(trainer.model))} == {True}


def test_gradient_checkpointing_changes_nothing(place: Path, tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        trainer = make_trainer("SFT", open_base(place), tmp_path, config_of(SOME), gradient_checkpointing=checkpointing)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


def test_resumed(place: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make_trainer("SFT", open_base(place), tmp_path, config_of(SOME), **saving)
    whole.train()
    resumed = make_trainer("SFT", open_base(place), tmp_path, config_of(SOME), **saving)
    assert differing(state(resumed.model), state(whole.model))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert not differing(state(resumed.model), state(whole.model))


def test_the_best_checkpoint(place: Path, tmp_path: Path) -> None:
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # the worst
    trainer = make_trainer("SFT", open_base(place), tmp_path, config_of(SOME), **often, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    first = PeftModel.from_pretrained(open_base(place), tmp_path / "checkpoint-1")
    assert torch.equal(output(trainer.model.get_base_model()), output(first.get_base_model()))


def test_the_loss_of_routers(place: Path, tmp_path: Path) -> None:
    """It is off while no router is left, and back with them."""
    base = open_base(place)
    base.config.output_router_logits = True
    coefficient = base.config.router_aux_loss_coef
    assert coefficient > 0

    def settings() -> tuple[Any, ...]:
        return base.config.output_router_logits, base.config.router_aux_loss_coef, base.router_aux_loss_coef

    model = get_peft_model(base, config_of(ALL))
    assert settings() == (False, 0.0, 0.0)
    with model.disable_adapter():
        assert settings() == (True, coefficient, coefficient)
        assert model(input_ids=torch.tensor([[5, 6, 7]])).aux_loss > 0
    assert settings() == (False, 0.0, 0.0)
    model.add_adapter("some", config_of(SOME))
    model.set_adapter("some")
    assert settings() == (True, coefficient, coefficient)
    model.set_adapter("default")
    assert settings() == (False, 0.0, 0.0)
    trainer = make_trainer("SFT", model, tmp_path)
    trainer.train()
    assert not logged(trainer, "aux_loss")
    assert trainer.model.unload() is base
    assert settings() == (True, coefficient, coefficient)


def test_other_modules_are_trained_too(place: Path, tmp_path: Path) -> None:
    config = CondenseAdapterConfig(plan=SOME, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    trainer = make_trainer("SFT", open_base(place), tmp_path, config)
    trainer.train()
    trainer.save_model(str(tmp_path / "result"))
    model = PeftModel.from_pretrained(open_base(place), tmp_path / "result")
    model.add_adapter("second", config_of(ALL))  # although the first has a wrapper that is not of the sparse model
    expected = output(trainer.model.get_base_model().eval())
    assert torch.equal(output(model.get_base_model()), expected)
    merged = model.merge_and_unload()
    assert torch.equal(output(merged), expected)
    assert differing(state(merged.lm_head), state(open_base(place).lm_head))


@pytest.mark.parametrize("model_type", ["granitemoeshared", "qwen2_moe"])
def test_a_base_in_4_bit(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type, max_positions=256, **WIDE).save_pretrained(tmp_path / "base")
    get_peft_model(open_base(tmp_path), config_of(SOME)).save_pretrained(tmp_path / "adapter")
    base = open_base(tmp_path, quantization_config=quantisation("nf4"), dtype="float32")
    full = with_weights_by_hand(tmp_path / "base", base)
    sparse = output(full)
    with pytest.raises(ValueError, match=r"Quantised weights can't be folded.*load it on the quantised model"):
        get_peft_model(base, config_of(SOME))
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    expected = output(PeftModel.from_pretrained(full, tmp_path / "adapter").get_base_model())
    assert distance(output(model.get_base_model()), expected) < 1e-5
    with model.disable_adapter():
        assert distance(output(model.get_base_model()), sparse) < 1e-5
    with pytest.raises(ValueError, match="quantised base can't be saved in one piece"):
        model.merge_and_unload()
    trainer = make_trainer("SFT", model, tmp_path, router_aux_loss_coef=0.0)
    before = state(trainer.model)
    trainer.train()
    changed = set(differing(before, state(trainer.model)))
    assert changed == {name for name in before if ".cdmoe_mlp." in name}
    assert quantised(trainer.model.unload())


def test_a_base_in_4_bit_that_was_used_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A forward pass on a CPU with AVX512-BF16 repacks weights; here this is done to one of them, on any CPU.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    tiny_model("qwen2_moe", max_positions=256, **WIDE).save_pretrained(tmp_path / "base")
    get_peft_model(open_base(tmp_path), config_of(SOME)).save_pretrained(tmp_path / "adapter")
    base = open_base(tmp_path, quantization_config=quantisation("nf4"), dtype="float32")
    sparse = output(base)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    first = open_base(tmp_path, quantization_config=quantisation("nf4"), dtype="float32")
    assert torch.equal(
        output(model.get_base_model()), output(PeftModel.from_pretrained(first, tmp_path / "adapter").get_base_model())
    )
    with model.disable_adapter():
        assert torch.equal(output(model.get_base_model()), sparse)
    weight = quantised(model.unload())["model.layers.0.self_attn.o_proj"].weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(ValueError, match=r"1 layers .* such as model\.layers\.0\.self_attn\.o_proj, pass no gradient"):
        PeftModel.from_pretrained(model.unload(), tmp_path / "adapter", is_trainable=True)
    PeftModel.from_pretrained(model.unload(), tmp_path / "adapter")  # for inference


def test_offloaded_bases(place: Path, tmp_path: Path) -> None:
    sparse = open_base(place)
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = dict.fromkeys(parts, "cpu") | {f"model.layers.{i}": "disk" for i in range(4)}
    on_disk = {"device_map": device_map, "offload_folder": str(tmp_path / "offloaded")}
    model = get_peft_model(open_base(place, **on_disk), config_of(SOME))
    condensed = output(apply_plan(open_base(place), SOME))
    assert torch.equal(output(model.get_base_model()), condensed)
    with model.disable_adapter():
        assert torch.equal(output(model.get_base_model()), output(sparse))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(output(PeftModel.from_pretrained(sparse, tmp_path / "adapter").get_base_model()), condensed)
    assert torch.equal(output(model.merge_and_unload()), condensed)
    for load in (PeftModel.from_pretrained, lambda base, folder: base.load_adapter(str(folder))):
        with pytest.raises(ValueError, match=r"weights on the disk: .*`condense_pretrained\(base, plan=adapter_folder"):
            load(open_base(place, **on_disk), tmp_path / "adapter")
