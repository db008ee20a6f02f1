"""Distillation, against the sparse model itself and sums written out by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F

from cdmoe_plugin import CondenseAdapterConfig, CondensePlan, apply_plan, condensed_module_names, unfreeze_condensed
from cdmoe_plugin.blocks import find_sparse_blocks
from cdmoe_plugin.model.lookup import condensed_layers
from cdmoe_plugin.recovery import Distillation, condensed_parameters, load_teacher_blocks
from tests.helpers.models import sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.recovery import condensed_model, lm_rows, make_trainer
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import available, tiny_model

IDS = torch.tensor([[5, 9, 33, 71, 18, 40, 2, 77], [8, 64, 3, 3, 50, 91, 27, 6]])
LABELS = torch.tensor([[5, 9, 33, 71, 18, 40, 2, 77], [-100, -100, 3, 3, 50, 91, -100, -100]])
PREDICTS = torch.cat([LABELS[:, 1:] != -100, torch.zeros(2, 1, dtype=torch.bool)], 1)
TYPES = ["qwen2_moe", "deepseek", "mixtral", "granitemoeshared"]


def pair(model_type: str, layers: list[int]) -> tuple[Any, Any, list[Any]]:
    """A sparse model, its condensed form, and the blocks that were replaced, from a third copy."""
    sparse = sparse_model(model_type)
    blocks = [block for block in find_sparse_blocks(copy.deepcopy(sparse)) if block.layer in layers]
    return sparse, apply_plan(copy.deepcopy(sparse), some_plan(layers)), blocks


def measure(distillation: Distillation, model: Any) -> Tensor:
    with distillation.watching() as seen:
        model(input_ids=IDS)
    return distillation.loss(seen, {"input_ids": IDS, "use_cache": False}, LABELS)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("model_type", [*TYPES, "gemma4_text", "granitemoe", "llama4_text"])
def test_logits_of_the_sparse_model(model_type: str, temperature: float) -> None:
    sparse, student, blocks = pair(model_type, [1, 3])
    if model_type == "granitemoe":  # divides its logits by a constant, after the head
        for model in (sparse, student):
            model.config.logits_scaling = 0.25
    distillation = Distillation(student, blocks, "logits", temperature=temperature)
    before = state(student)
    loss = measure(distillation, student)
    assert differing(before, state(student)) == []
    with torch.no_grad():
        p, q = (torch.softmax(m(input_ids=IDS).logits[PREDICTS].double() / temperature, -1) for m in (sparse, student))
    expected = temperature**2 * (p * (p.log() - q.log())).sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)
    assert float(expected) > 1e-4


def test_outputs_that_do_not_follow_from_inputs() -> None:
    """Gemma4's routers see something else than its experts."""
    _, student, blocks = pair("gemma4_text", [1, 3])
    with pytest.raises(ValueError, match="routers of their own"):
        Distillation(student, blocks, "blocks")


@pytest.mark.parametrize("model_type", [*TYPES, *filter(available, ["deepseek_v4"])])
def test_outputs_of_the_replaced_blocks(model_type: str) -> None:
    layers = [0, 3] if model_type == "deepseek_v4" else [1, 3]  # in its layer 0, experts go by token ids
    sparse, student, blocks = pair(model_type, layers)
    unfreeze_condensed(student)
    loss = measure(Distillation(student, blocks, "blocks"), student)
    loss.backward()

    inputs: dict[int, Tensor] = {}
    hooks = [
        mlp.register_forward_pre_hook(lambda _, args, layer=layer: inputs.update({layer: args[0].detach()}))
        for layer, mlp in condensed_layers(student).items()
    ]
    with torch.no_grad():
        student(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    total = 0.0
    for block in find_sparse_blocks(sparse):
        if block.layer not in inputs:
            continue
        mlp = copy.deepcopy(condensed_layers(student)[block.layer])
        mlp.zero_grad()
        with torch.no_grad():
            ids = {"input_ids": IDS} if model_type == "deepseek_v4" else {}
            target = block.module(inputs[block.layer], **ids)
            target = target[0] if isinstance(target, tuple) else target
            target = target.reshape(IDS.shape[0], IDS.shape[1], -1)
            for beside in block.summands[1:]:  # granitemoeshared's shared expert, of the decoder layer
                target = target + beside(inputs[block.layer])
        errors = (mlp(inputs[block.layer]).double() - target.double()).square().sum(-1)
        mine = (errors / target.double().square().sum(-1))[PREDICTS].sum() / 2
        mine.backward()
        total += float(mine)
        # Each layer learns from its own error alone.
        for name, parameter in mlp.named_parameters():
            own = condensed_layers(student)[block.layer].get_parameter(name)
            torch.testing.assert_close(own.grad, parameter.grad, rtol=1e-3, atol=1e-5)
    assert float(loss) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("target", ["logits", "blocks"])
def test_training_with_a_teacher_changes_condensed_layers_alone(target: str, tmp_path: Path) -> None:
    _, student, blocks = pair("qwen2_moe", [1, 3])
    teacher = {block.layer: state(block.module) for block in blocks}
    before = state(student)
    distillation = Distillation(student, blocks, target, weight=1.0)
    trainer = make_trainer(student, tmp_path, lm_rows()[:4], distillation=distillation)
    trainer.train()
    changed = set(differing(before, state(student)))
    gates = {name for name in condensed_parameters(student) if "shared_expert_gate" in name}
    assert changed | gates == set(condensed_parameters(student))
    assert all(differing(teacher[block.layer], state(block.module)) == [] for block in blocks)
    logged = [entry["distillation"] for entry in trainer.state.log_history if "distillation" in entry]
    assert logged[-1] < logged[0]


def test_share_of_distillation_in_the_loss(tmp_path: Path) -> None:
    def first_loss(weight: float | None) -> float:
        _, student, blocks = pair("qwen2_moe", [1, 3])
        distillation = None if weight is None else Distillation(student, blocks, "logits", weight=weight)
        trainer = make_trainer(student, tmp_path, distillation=distillation, max_steps=1, gradient_accumulation_steps=2)
        trainer.train()
        return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)

    plain, only, some = first_loss(None), first_loss(1.0), first_loss(0.25)
    assert some == pytest.approx(0.75 * plain + 0.25 * only, rel=1e-3)


def test_as_with_a_condense_adapter() -> None:
    """An adapter that is switched off is the same teacher in the same memory: see `recovery/distillation.py`."""
    sparse, student, blocks = pair("qwen2_moe", [1, 3])
    model = get_peft_model(sparse, CondenseAdapterConfig(plan=some_plan([1, 3])))
    numel = sum(p.numel() for p in model.parameters())
    assert numel == sum(p.numel() for part in (student, *(b.module for b in blocks)) for p in part.parameters())
    with torch.no_grad(), model.disable_adapter():
        teacher = model(input_ids=IDS).logits[PREDICTS].log_softmax(-1)
    loss = F.kl_div(model(input_ids=IDS).logits[PREDICTS].log_softmax(-1), teacher, reduction="sum", log_target=True)
    loss.backward()
    unfreeze_condensed(student)
    measured = measure(Distillation(student, blocks, "logits"), student)
    measured.backward()
    torch.testing.assert_close(measured, loss)
    found, expected = (
        {name.replace("base_model.model.", "").replace(".cdmoe_mlp.default", ""): p.grad for name, p in named}
        for named in ([(n, p) for n, p in m.named_parameters() if p.requires_grad] for m in (student, model))
    )
    torch.testing.assert_close(found, expected)


def test_teacher_of_a_model_with_lora() -> None:
    sparse, student, blocks = pair("deepseek", [1, 2])
    wrapped = get_peft_model(student, LoraConfig(r=2, target_modules=condensed_module_names(student)))
    distillation = Distillation(wrapped.get_base_model(), blocks, "logits")
    loss = measure(distillation, wrapped)
    loss.backward()
    with torch.no_grad():
        p, q = (torch.softmax(m(input_ids=IDS).logits[PREDICTS].double(), -1) for m in (sparse, wrapped))
    assert float(loss.detach()) == pytest.approx(float((p * (p.log() - q.log())).sum()), rel=1e-3)
    assert {name.partition(".lora_")[0] for name, p in wrapped.named_parameters() if p.grad is not None} == {
        f"base_model.model.{name}" for name in condensed_module_names_of(wrapped)
    }


def condensed_module_names_of(wrapped: Any) -> list[str]:
    return [name.removesuffix(".base_layer") for name in condensed_module_names(wrapped.get_base_model())]


def test_teacher_from_a_checkpoint_must_be_the_base_model(tmp_path: Path) -> None:
    sparse, student, _ = pair("qwen2_moe", [1, 3])
    sparse.save_pretrained(tmp_path / "base")
    blocks = load_teacher_blocks(tmp_path / "base", student.condense_plan)
    assert [block.layer for block in blocks] == [1, 3]
    assert differing(state(blocks[0].module), state(sparse.model.layers[1].mlp)) == []
    tiny_model("qwen2_moe", num_experts=4).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="experts"):
        load_teacher_blocks(tmp_path / "other", student.condense_plan)


def test_logits_that_are_no_multiple_of_the_heads_output_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, student, blocks = pair("qwen2_moe", [1])
    forward = student.forward

    def capped(*args: Any, **kwargs: Any) -> Any:  # as Gemma does
        output = forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits)
        return output

    monkeypatch.setattr(student, "forward", capped)
    with pytest.raises(ValueError, match="Use 'blocks'"):
        Distillation(student, blocks, "logits")


def test_tokens_on_which_a_block_gives_nothing() -> None:
    _, student, blocks = pair("mixtral", [1])
    for parameter in blocks[0].module.parameters():
        parameter.data.zero_()
    assert torch.isfinite(measure(Distillation(student, blocks, "blocks"), student))


def test_teacher_follows_the_model_to_its_device() -> None:
    for model_type in ("qwen2_moe", "granitemoeshared"):
        _, student, blocks = pair(model_type, [1])
        distillation = Distillation(student, blocks, "blocks")
        student.to("meta")  # as a trainer moves it to a GPU, after the teacher was made
        with distillation.watching():
            pass
        modules = [module for block in blocks for module in (block.module, block.shared) if module is not None]
        assert {p.device.type for module in modules for p in module.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hidden", 0.5, 1.0), "logits, blocks"),
        (("logits", 0.0, 1.0), "distillation_weight"),
        (("logits", 1.5, 1.0), "distillation_weight"),
        (("logits", 0.5, 0.0), "distillation_temperature"),
    ],
)
def test_bad_arguments(arguments: tuple[str, float, float], message: str) -> None:
    _, student, blocks = pair("qwen2_moe", [1])
    with pytest.raises(ValueError, match=message):
        Distillation(student, blocks, *arguments)


def test_missing_blocks_are_named() -> None:
    model = condensed_model(layers=(1, 3))
    _, _, blocks = pair("qwen2_moe", [1])
    with pytest.raises(ValueError, match=r"\[3\]"):
        Distillation(model, blocks, "blocks")
    assert isinstance(model.condense_plan, CondensePlan)
